import math

import pytest

from rft_cluster.algorithm.totals import normalised_sum, weighted_sum
from rft_cluster.messages import Reward

WEIGHTS = {"format": 0.5, "accuracy": 2.0}


def rewards(*parts: tuple[float, float]) -> list[Reward]:
    return [Reward(0.5 * own[0] + 2 * own[1], dict(zip(WEIGHTS, own, strict=True))) for own in parts]


def test_the_weighted_sum_is_the_scorers_total():
    assert weighted_sum(rewards((1, 0), (0, 1), (1, 1)), WEIGHTS) == [0.5, 2.0, 2.5]


def test_the_normalised_sum_by_hand():
    # format 4 0: deviations 2 and -2, std sqrt(8). accuracy 0 1: -0.5 and 0.5, std sqrt(0.5).
    form, accuracy = 2 / (math.sqrt(8) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = 0.5 * form - 2 * accuracy
    assert normalised_sum(rewards((4, 0), (0, 1)), WEIGHTS) == pytest.approx([expected, -expected], rel=1e-12)


def test_equal_sums_of_different_rewards_differ_when_normalised():
    group = rewards((1, 0), (1, 0), (0, 0.25))
    assert len(set(weighted_sum(group, WEIGHTS))) == 1
    low, _, high = normalised_sum(group, WEIGHTS)
    assert low < 0 < high


def test_a_reward_that_all_have_adds_exactly_nothing():
    one, other = normalised_sum(rewards((0.1, 0), (0.1, 1)), WEIGHTS)
    assert one == -other == pytest.approx(-2 * 0.5 / (math.sqrt(0.5) + 1e-4))
