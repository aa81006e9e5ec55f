"""Totals: combine a completion's rewards into one number, from which its advantage is computed.

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
    """sum(weight * (r - mean(r)) / (std(r) + epsilon)), with mean and std of each reward over the group.

    In a plain sum the rewards (1, 0) and (0, 1) count as equal, and a reward with a small range vanishes beside one
    with a large range. Source: GDPO, arXiv 2601.05242, which then divides by the deviation over the whole step. With
    the advantage `dr_grpo` the result is GDPO's, except for that factor, which is the same for the whole step.
    """
    parts = []
    for name, weight in weights.items():
        values = standardised([reward.parts[name] for reward in rewards])
        parts.append([weight * value for value in values])
    return [math.fsum(values) for values in zip(*parts, strict=True)]
