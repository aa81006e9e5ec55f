"""Launches that are refused before Ray starts, and leave nothing or disturb nobody."""

import time

import pytest

from tests.faults.launched import check_records, command, has_done, start, trained
from tests.faults.table import Row
from tests.integration.head import wait_until

BEFORE_RAY = 60.0  # seconds for a launch that starts nothing, on a busy machine


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.step_timeot=20"], "did you mean cluster.step_timeout"),
        (["cluster.step_timeout=0"], "cluster.step_timeout"),
        (["rewards.mine:judge=1", "cluster.step_timeout=60"], "Raise cluster.step_timeout above 310"),
        (["optimizer.learning_rate=1e39"], "optimizer.learning_rate"),
    ],
    ids=["unknown key", "no time", "deadlines", "no number"],
)
def test_a_wrong_value_is_refused_before_ray_starts(tmp_path, tiny_model, overrides, said):
    run = tmp_path / "mine"
    launch = start(command(tmp_path, "mine", tiny_model, *overrides), run)
    began = time.monotonic()
    launch.ends(2, BEFORE_RAY)
    assert "Ray started" not in launch.text()
    assert launch.text().startswith("error: ") and said in launch.text(), launch.text()
    assert not run.exists()
    Row(21, "a wrong key or value", found=time.monotonic() - began).write()


@pytest.mark.timeout(600)
def test_of_two_launches_of_a_run_one_is_refused_and_the_other_not_disturbed(undisturbed, tmp_path, tiny_model):
    run = tmp_path / "mine"
    words = command(tmp_path, "mine", tiny_model)
    pair = [start(words, run), start(words, run)]
    wait_until(lambda: any(launch.process.poll() is not None for launch in pair), BEFORE_RAY, "one is refused")
    refused, first = sorted(pair, key=lambda launch: launch.process.poll() is None)
    first.until(has_done(3), "step 3")
    for second in (refused, start([*words, "--resume"], run)):
        second.ends(2, BEFORE_RAY)
        assert second.text().startswith("error: ") and str(first.process.pid) in second.text(), second.text()
    first.ends(0)
    check_records(run)
    assert trained(run) == trained(undisturbed)
    Row(22, "two launches of one run folder", "at once, and after step 3", ledger=True, exact=True).write()
