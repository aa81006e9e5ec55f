"""The curves of a page: which figures of a step, and how to read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rft_cluster.run.figures import rounded, thinned
from rft_cluster.run.history import Row

MOST_POINTS = 2000  # of a curve: more than a page has pixels
DIGITS = 5  # of a figure


@dataclass(frozen=True)
class Chart:
    """`keys`: those of `metrics.jsonl`; one that ends in / stands for all that begin so. `reading`: one sentence."""

    title: str
    unit: str
    keys: tuple[str, ...]
    reading: str
    first: bool = False


CHARTS = (
    Chart("Reward", "", ("reward", "reward/"), "Mean of a completion, and its parts. It should rise.", first=True),
    Chart("Live groups", "share", ("live_groups",), "Groups whose rewards differ: only these teach.", first=True),
    Chart("Log-prob gap", "nats a token", ("logprob_gap",), "Small and level: the generators have the learners' "
          "weights. A jump says stale or wrong weights.", first=True),
    Chart("KL from the start", "nats a token", ("kl",), "How far the policy has moved. It should grow slowly.",
          first=True),
    Chart("Entropy", "nats a token", ("entropy",), "A fall to 0 means that the policy no longer tries anything.",
          first=True),
    Chart("Completion length", "tokens", ("completion_tokens",), "Mean number of tokens.", first=True),
    Chart("Cut short", "share", ("cut_short",), "Completions that ended at sampling.max_tokens."),
    Chart("Gradient norm", "L2 norm", ("grad_norm",), "Before clipping, the largest of a step's updates."),
    Chart("Clipped tokens", "share", ("clipped",), "Tokens whose policy ratio was clipped."),
    Chart("Importance weight", "ratio", ("importance",), "Learner over generator, truncated; 1 is on policy."),
    Chart("Loss", "", ("loss",), "In reinforcement learning its value says little, and a "
          "jump does. With SFT it is the negative log-likelihood of a target, in nats a token."),
    Chart("Learning rate", "", ("learning_rate",), "Warm-up, then a fall to 0 at the last step."),
    Chart("Staleness", "steps", ("staleness", "staleness_max"), "How far the policy was ahead of the weights that "
          "wrote a token: mean and largest."),
    Chart("Speed", "tokens/s", ("tokens_per_second",), "Sampled tokens over the seconds of all stages."),
    Chart("Seconds a step", "s", ("seconds/",), "By stage."),
    Chart("Memory", "GiB", ("memory_gib", "activation_gib"), "Peak of the fullest learner."),
    Chart("Completions without a reward", "completions", ("reward_failures",), "A reward function failed on them."),
    Chart("Updates left out", "updates", ("skipped",), "The gradient was infinite or not a number."),
)  # fmt: skip


def curves(steps: Sequence[Row]) -> dict[str, Any]:
    """The curves of a run for the page: {"step": [...], "charts": [{"title", ..., "series": {key: [...]}}]}.

    A figure that is always 0, or missing, has no curve if it is of the rarer kind.
    """
    rows = thinned(steps, MOST_POINTS)
    keys = sorted({key for row in rows for key in row})
    charts = []
    for chart in CHARTS:
        own = [key for key in keys if any(key == one or (one[-1] == "/" and key.startswith(one)) for one in chart.keys)]
        series = {key: [rounded(row.get(key), DIGITS) for row in rows] for key in own}
        if any(value for values in series.values() for value in values) or (chart.first and series):
            charts.append({"title": chart.title, "unit": chart.unit, "reading": chart.reading, "first": chart.first,
                           "series": series})  # fmt: skip
    return {"step": [row["step"] for row in rows], "charts": charts}
