"""Totals: how a completion's rewards become the one number that its advantage is computed from.

    weighted_sum([Reward(1.5, {"format": 1.0, "accuracy": 1.0})], {"format": 0.5, "accuracy": 1.0})  ->  [1.5]

A function gets the rewards of one group, without masked completions, and the weight of each reward by name.
"""

import math
from collections.abc import Mapping, Sequence

from rft_cluster.algorithm.advantages import standardised
from rft_cluster.messages import Reward


def weighted_sum(rewards: Sequence[Reward], weights: Mapping[str, float]) -> list[float]:
    """The scorer's own total, sum(weight * reward). GRPO with several rewards, as in the Visual-RFT recipe."""
    return [reward.total for reward in rewards if reward.total is not None]


def normalised_sum(rewards: Sequence[Reward], weights: Mapping[str, float]) -> list[float]:
    """sum(weight * (r - mean(r)) / (std(r) + epsilon)), mean and std of each reward by itself in the group.

    In a plain sum (1, 0) and (0, 1) count as equal, and a reward of a small range vanishes beside one of a large range.
    GDPO, arXiv 2601.05242, which then divides by the deviation over the whole step. With the advantage `dr_grpo` the
    result is GDPO's but for that factor, which is the same for all completions of the step.
    """
    parts = []
    for name, weight in weights.items():
        values = standardised([reward.parts[name] for reward in rewards])
        parts.append([weight * value for value in values])
    return [math.fsum(values) for values in zip(*parts, strict=True)]
