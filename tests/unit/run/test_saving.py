"""Checkpoints and exported models of a policy, with learners that only record their calls."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rft_cluster.classification.card import CARD_FILE, make_card, read_card
from rft_cluster.classification.report import Evaluation
from rft_cluster.common import stopping
from rft_cluster.common.errors import exit_code
from rft_cluster.common.files import DiskFull, unfinished, write_json
from rft_cluster.run.checkpoints import latest_checkpoint
from rft_cluster.run.saving import BEST, MODEL, Keeper, describe_models, is_complete
from tests.unit.run.begun import DATASET, TASK, config, shard


@pytest.fixture(autouse=True)
def no_signal_yet(monkeypatch):
    """A process is stopped once, so it never forgets a signal; these tests stop it again and again."""
    monkeypatch.setattr(stopping, "_received", None)


class Learners:
    def __init__(self) -> None:
        self.saved: list[int] = []

    def save_checkpoint(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.saved.append(state["step"])
        with unfinished(folder) as temporary:
            (temporary / "shard.safetensors").write_bytes(shard(256))
            write_json(temporary / "state.json", state)

    def export(self, folder: Path, files: Mapping[str, Any]) -> None:
        with unfinished(folder) as temporary:
            for name, content in files.items():
                write_json(temporary / name, content)


def keeper(folder: Path, learners: Learners, *overrides: str, step: int = 0) -> Keeper:
    settings = config(folder, *overrides)
    return Keeper(settings, make_card(settings, DATASET, TASK.text), learners, step, "0123abc")


def evaluation(step: int, accuracy: float) -> Evaluation:
    return Evaluation(step, "validation", accuracy, accuracy, 1.0, 100, (0.0, 1.0))


def test_steps_are_saved_when_due_and_never_twice(tmp_path):
    learners = Learners()
    kept = keeper(tmp_path, learners, "schedule.save_every=3", "schedule.steps=8", "optimizer.warmup_steps=0")
    for step in range(1, 9):
        with kept.step(step):
            pass
        kept.save_if_due()
        kept.save_if_due()
    assert learners.saved == [3, 6, 8]
    checkpoint, problems = latest_checkpoint(tmp_path / "mine")
    assert not problems
    assert (checkpoint.state.step, checkpoint.state.tiny_model) == (8, "0123abc")


def test_the_best_by_validation_is_kept_beside_the_last(tmp_path):
    kept = keeper(tmp_path, Learners(), "schedule.steps=40")
    run = tmp_path / "mine"
    best = []
    for step, accuracy in ((10, 0.5), (20, 0.84), (30, 0.84), (40, 0.8)):
        with kept.step(step):
            pass
        kept.keep_if_best(evaluation(step, accuracy))
        best.append((read_card(run / BEST).steps, read_card(run / BEST).validation))
    assert best == [(10, 0.5), (20, 0.84), (20, 0.84), (20, 0.84)]
    assert not is_complete(config(tmp_path, "schedule.steps=40"))
    kept.keep_last()
    assert not is_complete(config(tmp_path, "schedule.steps=40"))
    (run / "baselines.json").touch()
    assert is_complete(config(tmp_path, "schedule.steps=40"))
    assert not is_complete(config(tmp_path, "schedule.steps=50"))
    assert describe_models(run) == (
        f"  {run / MODEL}  the last: step 40, validation accuracy 80.0 %\n"
        f"  {run / BEST}  the best on the validation images: step 20, validation accuracy 84.0 %"
    )
    # A run that goes on knows the best so far from its folder.
    again = keeper(tmp_path, Learners(), step=20)
    again.keep_if_best(evaluation(20, 0.84))
    assert read_card(run / BEST).steps == 20


def test_a_card_of_an_older_version_is_read_and_of_a_newer_one_refused(tmp_path, capsys):
    kept = keeper(tmp_path, Learners())
    kept.keep_last()
    file = tmp_path / "mine" / MODEL / CARD_FILE
    values = json.loads(file.read_text())
    assert values.pop("format") == 2
    values.pop("validation")
    file.write_text(json.dumps(values))
    assert read_card(file.parent).validation is None
    assert describe_models(tmp_path / "mine") == f"  {tmp_path / 'mine' / MODEL}  the last: step 0"
    file.write_text(json.dumps({**values, "format": 3, "of_another_time": 1}))
    assert exit_code(lambda: read_card(file.parent) and 0) == 2
    assert "written by a newer version of rft_cluster: format 3" in capsys.readouterr().err


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("where", "on_disk"),
    [
        ("between steps", [5]),  # the learners hold step 5: nothing is lost
        ("in a step", [6]),  # which is short: it is finished
        ("in a step that fails", []),  # the learners may hold half of it
        ("after saving", [5]),
    ],
)
def test_a_signal_costs_no_whole_step(tmp_path, where, on_disk):
    learners = Learners()
    kept = keeper(tmp_path, learners, "schedule.save_every=100", step=4)

    def work() -> None:
        with kept.saved_when_stopped():
            with kept.step(5):
                pass
            if where == "after saving":
                kept._save()
            if where.startswith("in a step"):
                with kept.step(6):
                    stop()
                    if where == "in a step that fails":
                        raise RuntimeError("an actor died")
            stop()

    assert exit_code(work) == 143
    assert learners.saved == on_disk


def test_a_checkpoint_that_takes_long_is_not_begun_when_stopped(tmp_path, monkeypatch):
    learners = Learners()
    kept = keeper(tmp_path, learners, "schedule.save_every=1", "schedule.keep_checkpoints=9")
    clock = iter([0.0, 0.0, 25.0])  # due?, begin, end

    def work() -> None:
        with kept.saved_when_stopped():
            with kept.step(1):
                pass
            monkeypatch.setattr("rft_cluster.run.saving.time.monotonic", lambda: next(clock))
            kept.save_if_due()
            with kept.step(2):
                pass
            stop()

    assert exit_code(work) == 143
    assert learners.saved == [1]


@pytest.mark.parametrize("what", ["before", "while writing"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys, what):
    class Full(Learners):
        full = False

        def save_checkpoint(self, folder: Path, state: Mapping[str, Any]) -> None:
            assert not (self.full and what == "before"), "too little room, and that was not seen before"
            super().save_checkpoint(folder, state)

    learners = Full()
    kept = keeper(tmp_path, learners, "schedule.save_every=2", "schedule.steps=8", "optimizer.warmup_steps=0")
    usage = shutil.disk_usage(tmp_path)

    def begin(step: int) -> None:
        with kept.step(step):
            pass

    begin(2)
    kept.save_if_due()
    learners.full = True
    with monkeypatch.context() as patch:
        if what == "before":
            patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        else:
            patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        begin(4)
        kept.save_if_due()
        printed = capsys.readouterr().out
        assert printed.startswith("WARNING: step 4 is not saved, and the run goes on: ") and printed.count("\n") == 1
        begin(8)
        with pytest.raises(DiskFull):  # nobody would go on after the last step
            kept.save_if_due()
    assert [path.name for path in (tmp_path / "mine" / "checkpoints").iterdir()] == ["step-000002"]
    learners.full = False
    kept.save_if_due()
    assert latest_checkpoint(tmp_path / "mine")[0].state.step == 8


def test_a_model_for_which_there_is_no_room_costs_the_run_nothing_but_the_last_must_be_kept(tmp_path, capsys):
    class Full(Learners):
        def export(self, folder: Path, files: Mapping[str, Any]) -> None:
            raise DiskFull("no room")

    kept = keeper(tmp_path, Full(), "schedule.steps=8", "optimizer.warmup_steps=0")
    with kept.step(1):
        pass
    kept.keep_if_best(evaluation(1, 0.5))
    assert "the best policy so far, of step 1, is not exported, and the run goes on: no room" in capsys.readouterr().out
    with pytest.raises(DiskFull):
        kept.keep_last()
