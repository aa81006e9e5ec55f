from itertools import pairwise

import pytest

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.learner.learner import Learner, learning_rate_factor


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 20),  # linear warm-up: step + 1 of 20
        (1, 2 / 20),
        (18, 19 / 20),
        (19, 1.0),
        (20, 1.0),  # (80 - 20) / (80 - 20)
        (21, 59 / 60),
        (50, 0.5),  # (80 - 50) / 60
        (79, 1 / 60),  # the last step still learns
    ],
)
def test_warm_up_and_decay_by_hand(step, factor):
    assert learning_rate_factor(step, warmup_steps=20, steps=80) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 1.0), (1, 3 / 4), (2, 2 / 4), (3, 1 / 4)])
def test_without_warm_up_it_decays_from_the_start(step, factor):
    assert learning_rate_factor(step, warmup_steps=0, steps=4) == pytest.approx(factor)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (1, 2), (3, 4), (20, 80)])
def test_it_rises_to_one_then_falls_and_never_reaches_zero(warmup, steps):
    factors = [learning_rate_factor(step, warmup, steps) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1.0
    assert min(factors) > 0
    assert all(a < b for a, b in pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in pairwise(factors[peak:]))


class Unproved:
    def wait(self) -> None:
        raise WeightTransferError("generators 0 and 1 hold different parameters")


def test_no_checkpoint_of_weights_that_generators_were_not_proved_to_hold(tmp_path):
    learner = object.__new__(Learner)
    learner._broadcast = Unproved()
    with pytest.raises(WeightTransferError, match="hold different parameters"):
        learner.save_checkpoint(str(tmp_path))
    assert not list(tmp_path.iterdir())
