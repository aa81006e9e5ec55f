"""Checkpoints that are half written, or have changed on the disk: a run always finds a whole one, and says so."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.damage import damage
from tests.faults.launched import (
    check_records,
    command,
    finish,
    has_done,
    is_there,
    journal,
    start,
    trained,
    written_again,
)
from tests.faults.table import Row

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_model: str) -> Path:
    """A run whose driver was killed after step 10: its checkpoints are of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("stopped")
    launch = start(command(folder, "stopped", tiny_model), folder / "stopped")
    launch.until(has_done(10), "step 10")
    launch.until(is_there("checkpoints/step-000008"), "the checkpoint of step 8")
    launch.stop(signal.SIGKILL)
    return folder / "stopped"


def test_killed_before_any_call_of_a_checkpoints_writing_a_run_finds_a_whole_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crashing", tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    calls = done.stderr.split()
    found = [json.loads(line) for line in re.findall("^found: (.*)", done.stdout, re.MULTILINE)]
    assert len(calls) == len(found)
    assert {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"} <= set(calls)
    steps = [one["step"] for one in found]
    assert steps == sorted(steps) and set(steps) == {8, 12}
    for one in found:
        assert not one["left"]
        # An older one stays until the next is saved, if the crash came before it was removed.
        assert one["checkpoints"][-2:] == ["step-000008", "step-000012"]
        assert {f"step-{step + 1:06d}.jsonl" for step in range(one["step"], 12)} <= set(one["journal"])
    for call in calls:
        Row(14, "driver killed while it writes a checkpoint", f"before {call}").write()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", [pytest.param("weight", marks=pytest.mark.slow), "moment", "truncated"])
def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed, stopped, tmp_path, tiny_model, what):
    run = tmp_path / "mine"
    shutil.copytree(stopped, run)
    shard = min((run / "checkpoints" / "step-000008").glob("*.safetensors"))
    damage(shard, what)
    written = journal(run)
    said = finish([*command(tmp_path, "mine", tiny_model), "--resume"], run)
    (warning,) = re.findall("^WARNING: .*", said, re.MULTILINE)
    assert "passed over a damaged checkpoint" in warning and f"step-000008: {shard.name}" in warning
    assert "goes on after step 4 of 12" in said
    assert not written_again(written, run)
    check_records(run)
    assert trained(run) == trained(undisturbed)
    fault = "newest checkpoint truncated" if what == "truncated" else f"a bit of a {what} flipped"
    Row(15, f"{fault}, in the newest checkpoint" if what != "truncated" else fault, ledger=True, exact=True).write()
