"""A disk that is full: of a checkpoint, of the journal, of the exported model. The disk is a small one in memory."""

import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.launched import Launch, check_records, command, finish, has_done, is_there, shows, start, trained
from tests.faults.table import Row

MB = 10**6


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={150 * MB}", "tmpfs", str(folder)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a disk in memory is not permitted here: {tried.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int) -> Path:
    """Fill the disk with one file until `free` bytes are left, and return the file."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        while True:
            try:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free)
                break
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                time.sleep(0.001)  # the run has taken some of it meanwhile
    return ballast


def begin(disk: Path, model: str, *overrides: str) -> Launch:
    return start(command(disk, "mine", model, *overrides), disk / "mine", folder=disk.parent)


def nothing_half_written(run: Path) -> bool:
    return not [path for path in run.rglob("*") if path.suffix in (".tmp", ".old")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_for_which_there_is_no_room_costs_nothing(undisturbed, disk, tiny_model):
    # Without the best model of step 5, for which there might be no room either.
    launch = begin(disk, tiny_model, "schedule.evaluate_every=0")
    launch.until(has_done(2), "step 2")
    ballast = fill(disk, free=MB)
    launch.until(shows("step 4 is not saved"), "the warning")
    assert nothing_half_written(launch.run / "checkpoints")
    ballast.unlink()
    launch.ends(0)
    (warning,) = re.findall("^WARNING: .*", launch.text(), re.MULTILINE)
    assert warning.startswith("WARNING: step 4 is not saved, and the run goes on: ")
    assert sorted(path.name for path in (launch.run / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    check_records(launch.run)
    assert trained(launch.run) == trained(undisturbed)
    Row(16, "disk full at a checkpoint", "step 4", ledger=True, exact=True).write()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("what", "phase", "free"),
    [
        ("the journal", is_there("checkpoints/step-000004"), 0),
        ("the exported model", is_there("checkpoints/step-000012"), MB),
    ],
    ids=["journal", "export"],
)
def test_a_disk_without_room_for_what_must_be_kept_ends_the_run_until_there_is_room(
    undisturbed, disk, tiny_model, what, phase, free
):
    launch = begin(disk, tiny_model)
    launch.until(phase, what)
    ballast = fill(disk, free)
    launch.ends(2)
    assert nothing_half_written(launch.run)
    *_, error, cure = launch.text().splitlines()
    assert error.startswith("error: ") and "No space left on device" in error, launch.text()
    assert " is saved; go on with: " in cure
    ballast.unlink()
    finish(launch.cure(), launch.run)
    check_records(launch.run)
    assert trained(launch.run) == trained(undisturbed)
    Row(16, f"disk full at {what}", ledger=True, exact=True).write()
