import math

import pytest

from rft_cluster.algorithm.advantages import group_advantages, is_live


def test_two_completions_by_hand():
    # mean 0.5, deviations 0.5 and -0.5, std with n-1 = sqrt(0.25 + 0.25) = 0.70710678
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert group_advantages([1.0, 0.0]) == pytest.approx([expected, -expected], rel=1e-12)


def test_one_right_of_eight_by_hand():
    # Rewards 2 and seven times 1: mean 1.125; squares 0.875^2 + 7 * 0.125^2 = 0.875; std = sqrt(0.875 / 7)
    # = 0.35355339. Advantages 0.875 / 0.35365339 = 2.4741740 and -0.125 / 0.35365339 = -0.3534534.
    advantages = group_advantages([1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert advantages[2] == pytest.approx(2.4741740, abs=1e-6)
    assert advantages[0] == pytest.approx(-0.3534534, abs=1e-6)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-12)


def test_the_epsilon_is_added_to_the_deviation():
    # std 1 for [0, 1, 2]: 1 / (1 + 1)
    assert group_advantages([0.0, 1.0, 2.0], epsilon=1.0) == [-0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    "rewards",
    [
        [0.0] * 8,
        [1.5] * 8,
        [0.1] * 3,  # its mean in floating point is not 0.1
        [0.3, 0.1 + 0.2],  # equal but for rounding
        [1.0],
    ],
)
def test_a_group_without_variance_gets_exact_zeros(rewards):
    assert group_advantages(rewards) == [0.0] * len(rewards)
    assert not is_live(rewards)


def test_small_but_real_differences_are_live():
    assert is_live([0.0, 1e-6])
    assert is_live([0.0, 0.0, 1.0])


@pytest.mark.parametrize("rewards", [[], [1.0, math.nan], [math.inf, 0.0]])
def test_rewards_that_are_none_are_refused(rewards):
    with pytest.raises(ValueError, match="finite and at least one"):
        group_advantages(rewards)


def test_a_masked_completion_is_in_neither_mean_nor_deviation():
    # Of [1, 0]: as test_two_completions_by_hand.
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert group_advantages([None, 1.0, None, 0.0]) == [
        None,
        pytest.approx(expected, rel=1e-12),
        None,
        pytest.approx(-expected, rel=1e-12),
    ]


@pytest.mark.parametrize("rewards", [[None, None], [None, 1.0], [1.0, None, 1.0]])
def test_a_group_with_fewer_than_two_different_rewards_is_not_live(rewards):
    assert not is_live(rewards)
    assert group_advantages(rewards) == [None if reward is None else 0.0 for reward in rewards]


def test_a_masked_completion_hides_no_reward_that_is_none():
    with pytest.raises(ValueError, match="finite and at least one"):
        group_advantages([None, math.nan])
