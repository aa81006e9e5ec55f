"""Each advantage against numbers worked out by hand."""

import math

import pytest

from rft_cluster.algorithm import ADVANTAGES
from rft_cluster.algorithm.advantages import dr_grpo, gpg, grpo, is_live, rloo

# One right of eight: mean 1.125; squares 0.875^2 + 7 * 0.125^2 = 0.875; std with n - 1 = sqrt(0.875 / 7) = 0.35355339.
ONE_OF_EIGHT = [1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
DEAD = [[0.0] * 8, [1.5] * 8, [1.0], [0.1] * 3, [0.3, 0.1 + 0.2]]  # the mean of 0.1s is not 0.1; equal but for rounding


def test_grpo_by_hand():
    # 0.875 / 0.35365339 and -0.125 / 0.35365339
    ((first, _, second, *_),) = [advantages] = grpo([ONE_OF_EIGHT])
    assert (first, second) == pytest.approx((-0.3534534, 2.4741740), abs=1e-6)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-12)
    # mean 0.5, deviations 0.5 and -0.5, std sqrt(0.25 + 0.25)
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert grpo([[1.0, 0.0]]) == [pytest.approx([expected, -expected], rel=1e-12)]


def test_dr_grpo_by_hand():
    assert dr_grpo([ONE_OF_EIGHT, [0.0, 3.0]]) == [[-0.125, -0.125, 0.875, *[-0.125] * 5], [-1.5, 1.5]]


def test_rloo_by_hand():
    # Of [0, 1, 5] the others' means are 3, 2.5 and 0.5.
    assert rloo([[0.0, 1.0, 5.0]]) == [pytest.approx([-3.0, -1.5, 4.5])]


def test_gpg_by_hand():
    # Two of three groups are live: deviations times 3 / 2.
    assert gpg([[1.0, 0.0], [1.0, 1.0], [4.0, 0.0]]) == [[0.75, -0.75], [0.0, 0.0], [3.0, -3.0]]
    assert gpg([[1.0, 1.0]]) == [[0.0, 0.0]]
    assert gpg([]) == []


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("rewards", DEAD, ids=str)
def test_a_group_without_variance_gets_exact_zeros(name, rewards):
    assert ADVANTAGES[name]([rewards, [1.0, 0.0]])[0] == [0.0] * len(rewards)
    assert not is_live(rewards)


def test_small_but_real_differences_are_live():
    assert is_live([0.0, 1e-6])
    assert is_live([0.0, 0.0, 1.0])
