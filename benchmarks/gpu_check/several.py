"""The tier *several*: learners and generators on GPUs of their own. Three GRPO steps of each setting, as in the tier
*shared*; weights go by NCCL.

    1 generator                  2 GPUs
    1 generator, prefetch        2 GPUs     schedule.max_staleness=1: completions of the next step while learners work
    2 and 3 generators           3, 4 GPUs
    2 learners                   3 GPUs
    tensor parallelism 2         3 GPUs     of one generator

Each setting starts its actors anew, which takes most of its time: a minute or more. On CPUs the weights go by shared
memory, and there is no tensor parallelism.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

from benchmarks.gpu_check import shared
from benchmarks.gpu_check.checklist import Bench, Check, Outcome, once
from benchmarks.gpu_check.shared import NATS, STEPS, Run

OWN_GPUS = ("learners.gpus=1", "generators.gpus=1", "generators.gpu_memory=0.85")
# One update of random weights at the recipe's rate moves log-probabilities by about the limit (estimated), and with
# prefetch the generators' weights are one update behind.
SMALL_STEPS = "optimizer.learning_rate=1.0e-7"
# How many GPUs a setting needs, and its keys.
SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 generator": (2, ()),
    "prefetch": (2, ("schedule.max_staleness=1", SMALL_STEPS)),
    "2 generators": (3, ("generators.count=2",)),
    "3 generators": (4, ("generators.count=3",)),
    "2 learners": (3, ("learners.count=2",)),
    "tensor parallelism 2": (3, ("generators.gpus=2",)),
}


@once
def run(bench: Bench, setting: str) -> Run:
    """Three steps of a setting."""
    name = "several-" + setting.replace(" ", "-")
    return shared.steps_of(bench, name, *(OWN_GPUS if bench.device == "cuda" else ()), *SETTINGS[setting][1])


def transfer(setting: str, bench: Bench) -> Outcome:
    return shared.transferred(run(bench, setting), "nccl" if bench.device == "cuda" else "shared_memory")


def logprob_gap(setting: str, bench: Bench) -> Outcome:
    """Between the learners and the generators' weights, one version older with prefetch."""
    return shared.gap_of(run(bench, setting))


def seconds(setting: str, bench: Bench) -> Outcome:
    """Of the steps after the first, which warms up."""
    rows = run(bench, setting).rows[1:]
    parts = ", ".join(f"{phase} {median(row[f'seconds/{phase}'] for row in rows):.2f}" for phase in shared.PHASES)
    return Outcome(True, median(map(shared.whole_step, rows)), "s", parts)


def staleness(bench: Bench) -> Outcome:
    """Each step but the first was written by the weights before, and no token by older ones."""
    stalest = [row["staleness_max"] for row in run(bench, "prefetch").rows]
    return Outcome(stalest == [0, *[1] * (STEPS - 1)], max(stalest), "steps", f"by step {stalest}")


def gradient(bench: Bench) -> Outcome:
    """The first step's completions are the same but for rounding; a mean over ranks, not a sum, would be half of it."""
    both, one = (run(bench, setting).rows[0]["grad_norm"] for setting in ("2 learners", "1 generator"))
    return Outcome(0.8 <= both / one <= 1.25, both / one, "", f"{both:.4g} and {one:.4g}")


def checks_of(setting: str) -> list[Check]:
    gpus, _ = SETTINGS[setting]
    made: list[tuple[str, str, Callable[[str, Bench], Outcome]]] = [
        ("version held, verified", f"{STEPS}, by NCCL on GPUs", transfer),
        ("log-prob gap", f"at most {NATS} nats", logprob_gap),
        ("seconds a step", "measured", seconds),
    ]
    return [Check(f"{setting}: {name}", limit, partial(work, setting), gpus) for name, limit, work in made]


OF_A_SETTING = {
    "prefetch": Check("prefetch: staleness", "0, then 1 step", staleness, gpus=2),
    "2 learners": Check("2 learners: gradient over that of one", "0.8 to 1.25", gradient, gpus=3),
}
CHECKS = tuple(
    replace(check, cpu_lacks="tensor parallelism") if setting == "tensor parallelism 2" else check
    for setting in SETTINGS
    for check in [*checks_of(setting), *([OF_A_SETTING[setting]] if setting in OF_A_SETTING else [])]
)
