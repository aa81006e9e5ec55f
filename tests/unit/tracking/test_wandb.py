"""W&B's own library writes, without a server (WANDB_MODE=offline); its log is read here without it."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rft_cluster.tracking.figures import Shown
from rft_cluster.tracking.wandb import WandB
from tests.unit.run.begun import DATASET, config
from tests.unit.run.steps import stats
from tests.unit.tracking.test_tensorboard import EVALUATION, JUDGED, ROWS

wandb = pytest.importorskip("wandb", reason="W&B is optional: pip install wandb")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


BLOCK, HEADER = 32_768, 7  # bytes


def logged_records(log: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: a log of LevelDB, in which a record is cut where a block ends."""
    at, whole = HEADER, b""  # W&B's own header comes first
    while at + HEADER <= len(log):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + HEADER])
        whole += log[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def records(file: Path) -> list[Any]:
    """The records of a whole `.wandb` file. W&B's process may still be writing when its `finish` has returned."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(500):
        found = [Record.FromString(data) for data in logged_records(file.read_bytes())]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.01)
    raise AssertionError(f"{file} has no end")


def rows(run: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, figures) of a run's history, of all its parts in order. Of a nested value the path is joined by dots."""
    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                figures = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                found.append((record.history.step.num, figures))
    return found


def logged(folder: Path, first_step: int, last_step: int) -> Path:
    settings = config(folder)
    settings.run_folder.mkdir(exist_ok=True)
    tracker = WandB(settings, Shown(DATASET, 20))
    tracker.begin(first_step)
    if first_step == 0:
        tracker.evaluation(EVALUATION, JUDGED)
    for step in range(first_step + 1, last_step + 1):
        tracker.rollouts(step, ROWS)
        tracker.step(stats(step))
    tracker.begin(1)  # after a loss
    tracker.step(stats(2, seconds={"generate": 99.0}))
    tracker.close()
    return settings.run_folder


def test_a_run_is_logged_with_its_pictures_and_no_step_twice(tmp_path):
    run = logged(tmp_path, 0, 3)
    found = dict(rows(run))
    assert [step for step, _ in rows(run)] == [0, 1, 2, 3]
    assert found[0]["test/accuracy_strict"] == 0.5
    assert found[0]["test/confusion._type"] == "image-file"
    assert found[2]["train/reward"] == 0.75
    assert found[2]["train/seconds/generate"] == 2.0, "as it was sent first"
    assert found[2]["rollouts.captions"] == ["rose, a", "tulip, b"]
    assert "rollouts.captions" not in found[3]
    media = [file.name for file in run.glob("wandb/offline-run-*/files/media/images/**/*.png")]
    assert len([name for name in media if name.startswith("rollouts")]) == 4
    ours = json.loads((run / "wandb" / "rft_cluster.json").read_text())["id"]
    logged(tmp_path, 1, 4)
    assert {file.stem for file in run.glob("wandb/offline-run-*/*.wandb")} == {f"run-{ours}"}


def test_a_run_gets_one_of_its_own_while_the_one_before_still_sends(tmp_path):
    trackers = []
    for name in ("fold-1", "fold-2"):  # of one process
        settings = config(tmp_path, f"run.name={name}")
        settings.run_folder.mkdir()
        trackers.append(WandB(settings, Shown(DATASET, 20)))
        trackers[-1].begin(0)
    first, second = (json.loads(file.read_text())["id"] for file in sorted(tmp_path.glob("*/wandb/rft_cluster.json")))
    for tracker in trackers:
        tracker.close()
    assert first != second
