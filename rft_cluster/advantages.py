"""Group-relative advantages, GRPO's replacement for a value model (arXiv 2402.03300, section 4.1.2).

    A_i = (r_i - mean(r)) / (std(r) + epsilon),    std with n - 1

The epsilon and the n - 1 are those of the Visual-RFT recipe.
"""

import math
import statistics


def group_advantages(rewards: list[float], epsilon: float = 1e-4) -> list[float]:
    """How much better than its group each completion is, in standard deviations of the group.

    A group that is not live gets exact zeros: dividing its rounding errors by epsilon would make noise a
    signal.

    Raises:
        ValueError: there are no rewards, or one of them is not finite.
    """
    if not is_live(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + epsilon
    return [(reward - mean) / scale for reward in rewards]


def is_live(rewards: list[float]) -> bool:
    """Whether the rewards differ by more than rounding: only then has the group anything to teach.

    Raises:
        ValueError: there are no rewards, or one of them is not finite.
    """
    if not rewards or not all(map(math.isfinite, rewards)):
        raise ValueError(f"a group's rewards must be finite and at least one, got {rewards}")
    return not math.isclose(min(rewards), max(rewards), rel_tol=1e-9, abs_tol=1e-12)
