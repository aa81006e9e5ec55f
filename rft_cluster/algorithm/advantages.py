"""Advantages: how much better each completion is than its group. The group replaces a value model.

    grpo([[1.0, 0.0], [1.0, 1.0]])  ->  [[0.707, -0.707], [0.0, 0.0]]

A function maps a step's rewards, one list a group, to advantages of the same shape. Masked completions, and groups in
which all are masked, are left out. A group with equal rewards has nothing to teach and gets exact zeros: rounding
errors divided by a tiny deviation would be noise that looks like a signal.
"""

import math
import statistics
from collections.abc import Sequence

Step = Sequence[Sequence[float]]
EPSILON = 1e-4  # of the Visual-RFT recipe


def grpo(rewards: Step) -> list[list[float]]:
    """A = (r - mean(r)) / (std(r) + epsilon) in each group, std with n - 1.

    GRPO, arXiv 2402.03300, section 4.1.2. The epsilon and the n - 1 are those of the Visual-RFT recipe.
    """
    return [standardised(group) for group in rewards]


def dr_grpo(rewards: Step) -> list[list[float]]:
    """A = r - mean(r) in each group. Without a division, groups with larger differences get more weight.

    Dr. GRPO, arXiv 2503.20783, section 3.2; its loss has the normaliser `constant`.
    """
    return [centred(group) for group in rewards]


def rloo(rewards: Step) -> list[list[float]]:
    """A = r - mean(r of the others in the group) = n / (n - 1) * (r - mean(r)). The baseline is unbiased.

    REINFORCE leave-one-out (RLOO), arXiv 2402.14740. Its loss sums over a completion's tokens: the normaliser
    `constant`, but for a factor that is the same for all.
    """
    return [[len(group) / max(1, len(group) - 1) * value for value in centred(group)] for group in rewards]


def gpg(rewards: Step) -> list[list[float]]:
    """A = (r - mean(r)) * groups / live groups, so that groups with equal rewards do not shrink the gradient.

    GPG, arXiv 2504.02546, "accurate gradient estimation" (alpha = B / (B - M), F_norm = 1). Its loss has the normaliser
    `token` and no KL.
    """
    live = sum(map(is_live, rewards))
    return [[len(rewards) / max(1, live) * value for value in centred(group)] for group in rewards]


def target(rewards: Step) -> list[list[float]]:
    """A = 1 for each completion, which has no rewards: all are right answers, to be made likelier.

    Supervised fine-tuning: the gradient of GRPO's loss at a policy ratio of 1 is then that of the negative
    log-likelihood, which `loss.sft_loss` computes.
    """
    return [[1.0] * len(group) for group in rewards]


def is_live(rewards: Sequence[float]) -> bool:
    """Return True if a group's rewards differ by more than rounding."""
    return len(rewards) > 1 and not math.isclose(min(rewards), max(rewards), rel_tol=1e-9, abs_tol=1e-12)


def centred(rewards: Sequence[float]) -> list[float]:
    """r - mean(r) of one group; exact zeros if it is not live."""
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards] if is_live(rewards) else [0.0] * len(rewards)


def standardised(rewards: Sequence[float]) -> list[float]:
    """(r - mean(r)) / (std(r) + epsilon) of one group; exact zeros if it is not live."""
    scale = statistics.stdev(rewards) + EPSILON if len(rewards) > 1 else 1.0
    return [value / scale for value in centred(rewards)]
