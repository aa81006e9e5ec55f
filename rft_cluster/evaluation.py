"""Figures of an evaluation: the first completion of each held-out image, judged strictly."""

from dataclasses import dataclass

from rft_cluster.messages import Group
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.format import format_reward


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures on the `n` images of a split, 0 to 1; `interval` is the 95 % interval of `accuracy_strict`."""

    step: int
    split: str
    accuracy_strict: float
    format_rate: float
    n: int
    interval: tuple[float, float]


def summarise(step: int, split: str, groups: list[Group]) -> Evaluation:
    """Strict accuracy and format rate of each group's first completion.

    The interval is Wilson's score interval (E. B. Wilson, JASA 22, 1927, p. 209): unlike the textbook one it
    stays within 0 and 1 and is right for small n and for rates near 0 or 1.

    Raises:
        ValueError: there are no groups.
    """
    if not groups:
        raise ValueError(f"nothing to evaluate: no groups for split {split!r} at step {step}")
    from scipy.stats import binomtest  # takes a second to import

    n = len(groups)
    right = sum(int(accuracy_reward(group.prompt, group.completions[0])) for group in groups)
    formatted = sum(int(format_reward(group.prompt, group.completions[0])) for group in groups)
    interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Evaluation(step, split, right / n, formatted / n, n, (float(interval.low), float(interval.high)))
