"""Gradients that are not finite: the update is left out on all ranks, the run ends, and nothing spoilt is written."""

import re

import pytest

from tests.faults.launched import command, start
from tests.faults.table import Row


@pytest.mark.timeout(600)
def test_a_learning_rate_that_ruins_the_policy_ends_the_run_and_nothing_is_exported(tmp_path, tiny_model):
    run = tmp_path / "mine"
    overrides = ["optimizer.learning_rate=1e30", "schedule.stop_when_stuck=2"]
    launch = start(command(tmp_path, "mine", tiny_model, *overrides), run)
    launch.ends(2)
    *_, error, cure = launch.text().splitlines()
    assert re.match("error: .*optimizer.learning_rate", error), launch.text()
    assert "go on with: " in cure or "run.name" in cure
    assert not (run / "model").exists()
    Row(19, "a learning rate of 1e30", ledger=False).write()
