"""The tier *generator*: what the vLLM engine writes, without Ray. All checks share one engine, but for two that
compare it with an engine of another kind.

With random weights the likeliest tokens are close to each other, so kernels that round differently may part within a
greedy answer, and all tokens after that differ. So the log-probabilities of two answers are compared up to the first
token that differs, and how far that is.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch

from benchmarks.gpu_check.checklist import Bench, Check, Outcome, once
from benchmarks.gpu_check.engine import Engine, Policy
from benchmarks.gpu_check.material import OTHERS, images, prompts, run_config
from rft_cluster.messages import Completion, Group, Prompt, Sampling

PROMPTS = 16
GREEDY_TOKENS = 8
# A temperature of 1 would hide log-probabilities of another distribution than the sampled one.
CHANGES = ("sampling.temperature=0.7", "generators.gpu_memory=0.3")  # room for a second engine
SAME_NATS, SAME_SHARE = 0.005, 0.8  # the same kernels on the same weights
# Other kernels. BF16 and FP32 differ by 0.018 nats in the true shapes, old weights by 0.56, from the first token on.
OTHER_NATS, OTHER_SHARE = 0.05, 0.5
# Of the engine's share of the GPU. The rest is CUDA graphs, which stay, and room for activations, which is empty then.
GIVEN_BACK = 0.6
GIB = 2**30


@dataclass(frozen=True)
class Served:
    """An engine, the policy whose weights it has, and its first greedy answers."""

    engine: Engine
    policy: Policy
    asked: list[Prompt]
    sampling: Sampling
    answers: list[Group]
    seconds: float  # of the engine's start

    def ask(self, sampling: Sampling, version: int) -> list[Group]:
        return self.engine.call("generate", self.asked, sampling, version)


GREEDY = Sampling(1, 0.0, GREEDY_TOKENS)


@once
def served(bench: Bench) -> Served:
    config, pictures = run_config(bench, *CHANGES), images(bench, PROMPTS)
    started = time.perf_counter()
    engine = Engine(config, pictures)
    seconds = time.perf_counter() - started
    engine.call("serve_checkpoint", 0)
    asked = prompts(bench, PROMPTS)
    answers = engine.call("generate", asked, GREEDY, 0)
    policy = Policy(config, pictures, engine)
    return Served(engine, policy, asked, Sampling(**config.sampling.model_dump()), answers, seconds)


# Comparing answers


@dataclass(frozen=True)
class Agreement:
    """`nats`: mean difference of log-probabilities up to the first different token of each completion, which is
    compared, too. `share`: of the tokens that are compared. `equal`: all tokens are."""

    nats: float
    share: float
    equal: bool


def agreement(first: Sequence[Group], second: Sequence[Group]) -> Agreement:
    gaps, tokens = [], 0
    for one, other in zip(completions(first), completions(second), strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=False))
        end = next((i + 1 for i, (left, right) in enumerate(pairs) if left != right), len(pairs))
        both = zip(one.generator_logprobs[:end], other.generator_logprobs[:end], strict=True)
        gaps += [abs(left - right) for left, right in both]
        tokens += max(len(one.token_ids), len(other.token_ids))
    equal = [c.token_ids for c in completions(first)] == [c.token_ids for c in completions(second)]
    return Agreement(fmean(gaps), len(gaps) / tokens, equal)


def completions(groups: Sequence[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def outcome(found: Agreement, nats: float, share: float, note: str = "") -> Outcome:
    said = "all tokens equal" if found.equal else f"{100 * found.share:.0f} % of the tokens compared"
    return Outcome(found.nats <= nats and found.share >= share, found.nats, "nats", f"{said} {note}".strip())


# The checks


def start(bench: Bench) -> Outcome:
    made = served(bench)
    features = ", ".join(f"{name} {value}" for name, value in made.engine.features.items())
    return Outcome(True, made.seconds, "s", features)


def same_weights(bench: Bench, asleep: bool = False) -> Outcome:
    """Greedy answers by the checkpoint, and by the same weights after a transfer; `asleep`: after a sleep, too."""
    made = served(bench)
    version = after_sleep(made) if asleep else made.policy.send()
    return outcome(agreement(made.answers, made.ask(GREEDY, version)), SAME_NATS, SAME_SHARE)


def after_sleep(made: Served) -> int:
    """Let the engine sleep and wake, and send it the weights. Returns their version."""
    made.engine.call("sleep")
    made.engine.call("wake_up", ["weights"])
    version = made.policy.send()
    made.engine.call("wake_up", ["kv_cache"])
    return version


def another_family(bench: Bench, size: str) -> Outcome:
    """The log-probabilities of another family's engine, after a sleep where there is one, and those of the packed
    forward. (vLLM keeps rows of a Qwen3-VL's image beside its weights, and a sleep loses them.)"""
    other = replace(bench, size=size)
    made = served(other)
    try:
        version = after_sleep(made) if bench.device == "cuda" else made.policy.send()
        gap = made.policy.logprob_gap(made.ask(made.sampling, version))
    finally:
        made.engine.end()  # its memory is the next one's
    return Outcome(gap <= OTHER_NATS, gap, "nats")


def sleep_memory(bench: Bench) -> Outcome:
    """The memory that a sleeping engine gives back; it is awake again afterwards."""
    made = served(bench)
    before, whole = torch.cuda.mem_get_info()
    made.engine.call("sleep")
    freed = torch.cuda.mem_get_info()[0] - before
    made.engine.call("wake_up", ["weights"])
    made.policy.send()
    made.engine.call("wake_up", ["kv_cache"])
    share = freed / whole / run_config(bench, *CHANGES).generators.gpu_memory
    return Outcome(share >= GIVEN_BACK, freed / GIB, "GiB", f"{100 * share:.0f} % of the engine's share")


def logprob_gap(bench: Bench) -> Outcome:
    made = served(bench)
    gap = made.policy.logprob_gap(made.ask(made.sampling, made.policy.send()))
    return Outcome(gap <= OTHER_NATS, gap, "nats")


def changed_weights(bench: Bench) -> Outcome:
    """Other weights are sent: the engine's log-probabilities are those of the new policy."""
    made = served(bench)
    with made.policy.changed():
        groups = made.ask(made.sampling, made.policy.send())
        gap = made.policy.logprob_gap(groups)
    return Outcome(gap <= OTHER_NATS, gap, "nats")


def forbidden_tokens(bench: Bench) -> Outcome:
    """Samples by weights that prefer the forbidden tokens."""
    made = served(bench)
    with made.policy.changed():
        groups = made.ask(made.sampling, made.policy.send())
    tokens = [token for completion in completions(groups) for token in completion.token_ids]
    came = sum(token in made.policy.forbidden for token in tokens)
    return Outcome(came == 0, came, "tokens", f"of {len(tokens)}")


def seeds(bench: Bench) -> Outcome:
    """The same seeds twice, both with warm caches; then others."""
    made = served(bench)
    version = made.policy.send()
    ask: Callable[[], list[Group]] = partial(made.ask, made.sampling, version)
    ask()
    first, second = completions(ask()), completions(ask())
    others = replace(made, asked=[replace(prompt, seed=prompt.seed + 1000) for prompt in made.asked])
    third = completions(others.ask(made.sampling, version))
    differ = sum(one.token_ids != other.token_ids for one, other in zip(first, second, strict=True))
    same = sum(one.token_ids == other.token_ids for one, other in zip(first, third, strict=True))
    few = same <= len(first) / 10
    return Outcome(differ == 0 and few, differ, "completions", f"of {len(first)}; {same} equal with other seeds")


def speed(bench: Bench) -> Outcome:
    made = served(bench)
    version = made.policy.send()
    made.ask(made.sampling, version)
    started = time.perf_counter()
    groups = made.ask(made.sampling, version)
    seconds = time.perf_counter() - started
    tokens = sum(len(completion.token_ids) for completion in completions(groups))
    return Outcome(True, tokens / seconds, "tokens/s", f"{len(completions(groups))} completions, {seconds:.2f} s")


def another_engine(bench: Bench, feature: str, option: str, value: bool) -> Outcome:
    """Greedy answers of the usual engine and of one without a feature, on the same weights."""
    made = served(bench)
    config, pictures = run_config(bench, *CHANGES), images(bench, PROMPTS)
    other = Engine(config, pictures, **{option: value})
    try:
        other.call("serve_checkpoint", 0)
        found = agreement(made.answers, other.call("generate", made.asked, GREEDY, 0))
    finally:
        other.end()
    kinds = made.engine.features[feature], other.features[feature]
    if kinds[0] == kinds[1]:
        raise RuntimeError(f"{feature} is {kinds[0]} in both engines: nothing was compared")
    return outcome(found, OTHER_NATS, OTHER_SHARE, f"({feature} {kinds[0]} and {kinds[1]})")


SAME = f"at most {SAME_NATS} nats apart"
OTHER = f"at most {OTHER_NATS} nats apart"
ROOM = f"at least {100 * GIVEN_BACK:.0f} % of its share"
CHECKS = (
    Check("engine: start", "measured", start),
    Check("transfer: the same weights, greedy answers", SAME, same_weights),
    Check("transfer: other weights, log-probs", OTHER, changed_weights),
    Check("sleep: memory given back", ROOM, sleep_memory, cpu_lacks="a sleep mode"),
    Check("sleep, wake, transfer: greedy answers", SAME, partial(same_weights, asleep=True), cpu_lacks="a sleep mode"),
    Check("log-probs: engine and packed forward", OTHER, logprob_gap),
    Check("forbidden tokens: sampled", "0", forbidden_tokens),
    Check("seeds: completions that differ", "0", seeds),
    Check("speed", "measured", speed),
    Check(
        "CUDA graphs on and off: greedy answers", OTHER,
        partial(another_engine, feature="cuda_graphs", option="enforce_eager", value=True), cpu_lacks="CUDA graphs",
    ),
    Check(
        "async scheduling on and off: greedy answers", OTHER,
        partial(another_engine, feature="async_scheduling", option="async_scheduling", value=False),
        cpu_lacks="async scheduling",
    ),
    *(
        Check(f"{family.name}: log-probs after sleep and transfer", OTHER, partial(another_family, size=size))
        for size, family in OTHERS.items()
    ),
)  # fmt: skip
