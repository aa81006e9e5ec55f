"""Group-relative advantages, GRPO's replacement for a value model (arXiv 2402.03300, section 4.1.2).

    A_i = (r_i - mean(r)) / (std(r) + epsilon),    std with n - 1

The epsilon and the n - 1 are those of the Visual-RFT recipe.
"""

import math
import statistics
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float | None], epsilon: float = 1e-4) -> list[float | None]:
    """How much better than its group each completion is, in standard deviations of the group.

    A masked completion (reward None) gets None and is in neither mean nor deviation. The others of a group that is
    not live get exact zeros: dividing its rounding errors by epsilon would make noise a signal.

    Raises:
        ValueError: there are no rewards, or one of them is not finite.
    """
    if not is_live(rewards):
        return [None if reward is None else 0.0 for reward in rewards]
    valid = [reward for reward in rewards if reward is not None]
    mean = statistics.fmean(valid)
    scale = statistics.stdev(valid) + epsilon
    return [None if reward is None else (reward - mean) / scale for reward in rewards]


def is_live(rewards: Sequence[float | None]) -> bool:
    """Whether the rewards differ by more than rounding: only then has the group anything to teach.

    Masked completions (None) do not count.

    Raises:
        ValueError: there are no rewards, or one of them is not finite.
    """
    valid = [reward for reward in rewards if reward is not None]
    if not rewards or not all(map(math.isfinite, valid)):
        raise ValueError(f"a group's rewards must be finite and at least one, got {rewards}")
    return len(valid) > 1 and not math.isclose(min(valid), max(valid), rel_tol=1e-9, abs_tol=1e-12)
