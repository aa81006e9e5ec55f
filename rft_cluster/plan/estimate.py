"""The estimate of a run: what fits where, and how long it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from rft_cluster.config import Config
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.cards import Card
from rft_cluster.plan.memory import GIB, activations, key_value_bytes
from rft_cluster.plan.places import Place, engine, places
from rft_cluster.plan.seconds import Seconds, answers_seconds, step_seconds
from rft_cluster.plan.work import Prompts, Row, fullest_row, learner_share
from rft_cluster.run.answers import ALSO
from rft_cluster.run.asking import most_rounds

SHORT = 4  # the shorter completions have a quarter of `sampling.max_tokens`
SHORTEST = 16  # tokens: a completion with the four tags of the format and a word has about as many
TIGHT = 0.08  # of the limit; allocators lose some of a memory to fragments


@dataclass(frozen=True)
class Plan:
    """The estimate of a run. `cache_tokens`: of an engine's KV cache, which needs `least_tokens` to start at all.
    `seconds`, `hours`, `evaluations`, `options`, `most`: by the completions' mean length in tokens; hours of all steps,
    of all evaluations, of asking the policy for its own options, and of all steps if each has all rounds of prompts
    that it may have."""

    row: Row
    places: list[Place]
    cache_tokens: float
    least_tokens: int
    seconds: dict[int, Seconds]
    hours: dict[int, float]
    evaluations: dict[int, float]
    options: dict[int, float]
    most: dict[int, float]

    @property
    def fits(self) -> bool:
        return self.serves and all(place.free >= TIGHT * place.limit for place in self.places)

    @property
    def serves(self) -> bool:
        """True if the engines start: vLLM refuses a cache that does not hold one prompt and its completion."""
        return self.cache_tokens >= self.least_tokens

    @property
    def fullest(self) -> float:
        """Bytes of the fullest memory in its fullest phase."""
        return max(place.peak(place.fullest) for place in self.places)

    @property
    def slowest(self) -> float:
        """Seconds of a step with the longest completions."""
        return max(seconds.step for seconds in self.seconds.values())


def make_plan(config: Config, shapes: Shapes, prompts: Mapping[str, Prompts], card: Card) -> Plan:
    """Estimate a run with these prompts on such cards. For a run on CPUs, `card` is the machine."""
    most = config.sampling.max_tokens
    lengths = sorted({max(1, most // SHORT), most})
    train = prompts["train"]
    row, micro_batches = worst_row(config, shapes, train)
    step = partial(step_seconds, shapes, card=card, prompt=train.mean)
    seconds = {length: step(config, length=length) for length in lengths}
    answers = partial(answers_seconds, shapes, config, card)
    longest, schedule, asked = with_all_rounds(config), config.schedule, evaluated(config, prompts)
    samples = config.sampling.group_size if config.prompt.options != "all" else 0

    def hours(of: Callable[[int], float]) -> dict[int, float]:
        return {length: of(length) / 3600 for length in lengths}

    return Plan(
        row,
        places(shapes, config, card, row, micro_batches),
        cache_tokens(shapes, config, card),
        config.max_model_tokens,
        seconds,
        hours(lambda length: seconds[length].step * schedule.steps),
        hours(lambda length: sum(times * answers(prompts[split], length) for split, times in asked)),
        hours(lambda length: answers(train, length, samples) if samples else 0.0),
        hours(lambda length: in_all_rounds(config, step(longest, length=length), seconds[length]) * schedule.steps),
    )


def in_all_rounds(config: Config, longest: Seconds, first: Seconds) -> float:
    """Seconds of a step with all the rounds of prompts that it may have. Its completions are generated round by round,
    each as long as the `first`, and all are learned from; only the first round's may overlap that."""
    rounds = most_rounds(config.schedule)
    return replace(longest, generate=first.generate).step + (rounds - 1) * first.generate


def with_all_rounds(config: Config) -> Config:
    """The run if each step has all the rounds of prompts that it may have (`schedule.min_live`)."""
    rounds = most_rounds(config.schedule)
    update = {"prompts_per_step": rounds * config.schedule.prompts_per_step}
    return config.model_copy(update={"schedule": config.schedule.model_copy(update=update)})


def cache_tokens(shapes: Shapes, config: Config, card: Card) -> float:
    """Tokens of an engine's KV cache."""
    if config.cluster.device == "cpu":
        return config.generators.kv_cache_gib * GIB / key_value_bytes(shapes)
    return engine(shapes, config, card.gib).tokens


def worst_row(config: Config, shapes: Shapes, prompts: Prompts) -> tuple[Row, int]:
    """The micro-batch with the most activations, over all lengths of completions, and how many an update has then.

    Short completions leave room for more prompts in a row, whose images take more than the completions. A step with
    more prompts than there are images asks about some of them several times."""
    a_step, updates = config.schedule.prompts_per_step, config.algorithm.updates_per_step
    a_rank, times = -(-a_step // (config.learners.count * updates)), -(-a_step // prompts.count)
    longest = [prompt for prompt in prompts.longest[:a_rank] for _ in range(times)][:a_rank]
    group, limit, length = config.completions, config.learners.micro_batch_tokens, config.sampling.max_tokens
    found: list[tuple[float, Row, int]] = []
    while not found or length >= SHORTEST:
        row = fullest_row(longest, group, length, limit)
        kept = activations(shapes, config, row)
        found.append((kept.text + kept.vision, row, learner_share(config, longest[0], length).micro_batches // updates))
        length //= 2
    _, row, micro_batches = max(found, key=lambda one: one[0])
    return row, micro_batches


def evaluated(config: Config, prompts: Mapping[str, Prompts]) -> list[tuple[str, int]]:
    """Which splits are evaluated how often: validation images every so many steps and at the end, test images and those
    of `evaluation.also` twice."""
    schedule = config.schedule
    every = schedule.evaluate_every
    validations = -(-schedule.steps // every) if every else 0
    often = {"validation": validations, "test": 2, ALSO: 2}
    return [(split, times) for split, times in often.items() if split in prompts and prompts[split].count * times]
