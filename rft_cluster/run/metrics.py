"""The figures of a step, and the sinks that record them.

    stats = step_stats(1, groups, rewards, advantages, learned, stage.seconds)
    for sink in (metrics_file(path), console(steps), *own_sinks(config)): sink(stats)

A sink is a function that gets every step's `StepStats`; docs/metrics.md lists the fields. Write one for a dashboard,
and name it in `run.sinks`.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from rft_cluster.common.function import Function
from rft_cluster.common.lookup import find_function
from rft_cluster.config import Config
from rft_cluster.messages import Completion, Group, LearnerStats, Reward
from rft_cluster.run.records import append

RECENT = 20  # steps over which the time left is estimated


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of training. Each type is annotated with its unit. None: the step has no such figure, or none that is
    finite.

    In `metrics.jsonl` the key is the field's name (except for `KEYS`). A mapping has a key `KEY/NAME` for each entry. A
    field that is None has no key.
    """

    step: Annotated[int, "step"]
    """Number of the step, from 1, and version of the weights that it made."""
    reward: Annotated[float | None, "reward"]
    """Weighted sum of a completion's rewards, mean over completions that are not masked. None with SFT."""
    reward_parts: Annotated[Mapping[str, float], "reward"]
    """The reward NAME, unweighted, mean over completions for which no reward failed."""
    reward_failures: Annotated[int, "completions"]
    """Masked completions: those for which a reward failed."""
    failures: Annotated[Mapping[str, int], "completions"]
    """Completions for which the reward NAME failed."""
    groups: Annotated[int, "groups"]
    """Groups of the step: `schedule.prompts_per_step`, and those that `schedule.min_live` asked for further."""
    live_groups: Annotated[float, "share of groups"]
    """Groups with an advantage that is not 0: only these teach."""
    skipped_groups: Annotated[int, "groups"]
    """The other groups: nothing is learned from them."""
    logprob_gap: Annotated[float | None, "nats a token"]
    """Log-prob gap: |learner's log-probability - generator's|, mean over trained tokens, as are the next four. Of
    these five SFT has the entropy alone."""
    kl: Annotated[float | None, "nats a token"]
    """KL from the starting model, estimated (k3); 0 if `algorithm.kl_beta` is 0."""
    entropy: Annotated[float | None, "nats a token"]
    """Entropy of the policy's distribution."""
    importance: Annotated[float | None, "ratio"]
    """Importance weight, learner over generator, truncated at `algorithm.importance_cap`."""
    clipped: Annotated[float | None, "share of tokens"]
    """Tokens whose policy ratio was clipped."""
    loss: Annotated[float | None, "loss"]
    """Mean over the step's optimizer updates; with SFT the negative log-likelihood of the targets, in nats a token."""
    grad_norm: Annotated[float | None, "L2 norm"]
    """Gradient before clipping, the largest of the step's updates."""
    learning_rate: Annotated[float | None, "1"]
    """Learning rate of the step's updates."""
    updates: Annotated[int | None, "updates"]
    """Optimizer updates: `algorithm.updates_per_step`, or as many as there were completions to train on if fewer."""
    skipped: Annotated[int | None, "updates"]
    """Optimizer updates left out because the loss or the gradient was not finite."""
    memory_gib: Annotated[float | None, "GiB"]
    """Peak memory of the fullest learner: of a GPU in this step, of a CPU process since its start."""
    activation_gib: Annotated[float | None, "GiB"]
    """GPU only: the step's share of that peak, with gradients and, in the first step, Adam's moments."""
    completion_tokens: Annotated[float, "tokens"]
    """Mean length of a completion."""
    cut_short: Annotated[float, "share of completions"]
    """Completions that were cut at `sampling.max_tokens`."""
    oldest_version: Annotated[int, "version"]
    """Version of the oldest weights that wrote a token of this step."""
    staleness: Annotated[float, "steps"]
    """How many steps the policy was ahead of the weights that wrote a token, mean over tokens."""
    staleness_max: Annotated[int, "steps"]
    """The same for the stalest token: at most `schedule.max_staleness`."""
    tokens: Annotated[int, "tokens"]
    """Tokens sampled in this step; with SFT those of its targets."""
    tokens_trained: Annotated[int, "tokens"]
    """Tokens of completions that were trained on; 0 if there was no update."""
    tokens_per_second: Annotated[float | None, "tokens/s"]
    """Sampled tokens divided by the seconds of all stages."""
    seconds: Annotated[Mapping[str, float], "s"]
    """Time of each stage: `generate` (wait for completions and rewards), `learn`, `transfer` (of weights)."""
    replayed: Annotated[bool, "true or false"] = False
    """True: the completions came from the journal, after a fault. Then the step has no `tokens_per_second`."""

    def row(self) -> dict[str, Any]:
        """The flat object for `metrics.jsonl`."""
        row: dict[str, Any] = {}
        for field in fields(self):
            value, key = getattr(self, field.name), KEYS.get(field.name, field.name)
            if isinstance(value, Mapping):
                row |= {f"{key}/{name}": entry for name, entry in value.items()}
            elif value is not None:
                row[key] = value
        return row


KEYS = {"reward_parts": "reward", "failures": "reward_failures"}  # keys that differ from the field's name
Sink = Callable[[StepStats], None]


OTHER = "other"
"""The phase between stages."""


class Stopwatch:
    """Seconds spent in named stages of a step. `begin`: called with the phase that begins, a stage or `OTHER`."""

    def __init__(self, begin: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = begin

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._begin(stage)
        start = time.monotonic()
        try:
            yield
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
        finally:
            self._begin(OTHER)


def version_spans(completion: Completion) -> tuple[tuple[int, int], ...]:
    """The weights that wrote a completion: (version, number of tokens) in order; one pair unless they changed."""
    return completion.version_spans or ((completion.policy_version, len(completion.token_ids)),)


def step_stats(
    step: int,
    groups: Sequence[Group],
    rewards: Sequence[Sequence[Reward]],
    advantages: Sequence[Sequence[float | None]],
    learned: LearnerStats | None,
    seconds: Mapping[str, float],
) -> StepStats:
    """Compute a step's figures. At least one completion must have a reward. `learned`: None if there was no update."""
    every = [reward for group in rewards for reward in group]
    valid = [reward.parts for reward in every if not reward.failures]
    completions = [completion for group in groups for completion in group.completions]
    spans = [span for completion in completions for span in version_spans(completion)]
    tokens = sum(len(completion.token_ids) for completion in completions)
    oldest = min(version for version, _ in spans)
    return StepStats(
        step=step,
        reward=fmean(reward.total for reward in every if reward.total is not None) if valid[0] else None,
        reward_parts={name: fmean(parts[name] for parts in valid) for name in valid[0]},
        reward_failures=len(every) - len(valid),
        failures=Counter(name for reward in every for name in reward.failures),
        groups=len(groups),
        live_groups=fmean(any(group) for group in advantages),
        skipped_groups=sum(not any(group) for group in advantages),
        **_learner_figures(learned, any(completion.generator_logprobs for completion in completions)),
        completion_tokens=tokens / len(completions),
        cut_short=fmean(completion.finish_reason == "length" for completion in completions),
        oldest_version=oldest,
        # At the start of the step the learners had version `step - 1`.
        staleness=sum(count * (step - 1 - version) for version, count in spans) / max(1, tokens),
        staleness_max=step - 1 - oldest,
        tokens=tokens,
        tokens_trained=learned.tokens if learned else 0,
        tokens_per_second=tokens / sum(seconds.values()),
        seconds=seconds,
    )


def _learner_figures(learned: LearnerStats | None, sampled: bool) -> dict[str, Any]:
    """Divide sums over tokens by the tokens; keep the other figures. All are None if there was no update. Those that
    compare the policy with another one are None for completions that were not `sampled`.

    A figure that is not finite is None, too: JSON has no such number.
    """
    compared, means = ("logprob_gap", "kl", "importance", "clipped"), ("entropy",)
    others = ("loss", "grad_norm", "learning_rate", "updates", "skipped", "memory_gib", "activation_gib")
    if learned is None:
        return dict.fromkeys((*compared, *means, *others))
    figures = {
        **{name: getattr(learned, name) / max(1, learned.tokens) if sampled else None for name in compared},
        **{name: getattr(learned, name) / max(1, learned.tokens) for name in means},
        **{name: getattr(learned, name) for name in others},
    }
    return {name: None if value is not None and not math.isfinite(value) else value for name, value in figures.items()}


def metrics_file(path: Path) -> Sink:
    """A sink that appends every step to a file, one object a line."""
    return lambda stats: append(path, stats.row())


def console(steps: int) -> Sink:
    """A sink that prints every step on one line, with the time left for all `steps`."""
    recent: deque[float] = deque(maxlen=RECENT)

    def show(stats: StepStats) -> None:
        if not stats.replayed:  # a step without its completions is far shorter than those to come
            recent.append(sum(stats.seconds.values()))
        left = (steps - stats.step) * fmean(recent) if recent else None
        print(step_line(steps, stats, left), flush=True)

    return show


def own_sinks(config: Config) -> list[Sink]:
    """Import the functions in `run.sinks`.

    Raises:
        UserError: a function cannot be imported, or does not take one argument.
    """
    sinks = [
        Function(f"run.sinks: {name!r}", "sink(stats)", find_function(name, {}, "run.sinks"))
        for name in config.run.sinks
    ]
    for sink in sinks:
        sink.check_takes(None)
    return list(sinks)


def step_line(steps: int, stats: StepStats, seconds_left: float | None) -> str:
    """The console's line for a step. `seconds_left`: None if they are not known."""
    total = sum(stats.seconds.values())
    shares = " ".join(f"{stage} {100 * value / total:.0f}%" for stage, value in stats.seconds.items())
    rate = "from the journal" if stats.tokens_per_second is None else f"{stats.tokens_per_second:.0f} tok/s"
    left = "" if seconds_left is None else f"  {clock(seconds_left)} left"
    return f"step {stats.step:>{len(str(steps))}}/{steps}  {_learned(stats)}  {rate}  [{shares}]{left}"


def _learned(stats: StepStats) -> str:
    """What the step learned from, for people: rewards, or with SFT its loss."""
    if stats.reward is None:
        return "loss not finite" if stats.loss is None else f"loss {stats.loss:.4f} nats a token"
    parts = " ".join(f"{name} {value:.2f}" for name, value in stats.reward_parts.items())
    if stats.reward_failures:
        failed = " ".join(f"{name} {count}" for name, count in stats.failures.items())
        parts += f"; {stats.reward_failures} completions without: {failed} failed"
    cut = f"{max(1, round(100 * stats.cut_short))} % cut at max_tokens  " if stats.cut_short else ""
    gap = "log-prob gap not finite" if stats.tokens_trained else "no live group: no update"
    if stats.logprob_gap is not None:
        gap = f"log-prob gap {stats.logprob_gap:.4f}"
    return f"reward {stats.reward:.2f} ({parts})  live {stats.live_groups:.2f}  {cut}{gap}"


def clock(seconds: float) -> str:
    """Format seconds: 3725 -> 1:02:05, 65 -> 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
