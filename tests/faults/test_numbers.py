"""Numbers that are not finite: an update is left out on all ranks, the run ends, and nothing spoilt is written."""

import re

import pytest

from tests.faults.launched import command, start
from tests.faults.table import Row


def overflowing(totals: list[list[float]]) -> list[list[float]]:
    """A user's own advantages: finite, but not in the FP32 of the learners."""
    return [[1e300 * (total - sum(group) / len(group)) for total in group] for group in totals]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "overrides", "said"),
    [
        (
            "a loss that overflows",
            ["algorithm.advantage=tests.faults.test_numbers:overflowing"],
            "error: .*the gradient was infinite or not a number, and the update was left out",
        ),
        (
            "a learning rate of 10",
            ["optimizer.learning_rate=10", "optimizer.weight_decay=1000"],
            "error: .*optimizer.learning_rate",
        ),
    ],
    ids=["loss", "weights"],
)
def test_numbers_that_are_not_finite_end_the_run_and_are_not_exported(tmp_path, tiny_model, fault, overrides, said):
    run = tmp_path / "mine"
    launch = start(command(tmp_path, "mine", tiny_model, *overrides, "schedule.stop_when_stuck=2"), run)
    launch.ends(2)
    assert re.search(said, launch.text()), launch.text()
    if "loss" in fault:
        warnings = re.findall("^WARNING: step (.*)", launch.text(), re.MULTILINE)
        assert [warning[0] for warning in warnings] == ["1", "2"]
        assert all("left out on all learners" in warning and "train/" in warning for warning in warnings)
    assert not (run / "model").exists()
    Row(19, fault, launch.text().splitlines()[-1]).write()
