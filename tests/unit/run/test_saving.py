"""Checkpoints and exported models of a policy, with learners that only record their calls."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rft_cluster.classification.card import CARD_FILE, make_card, read_card
from rft_cluster.classification.report import Evaluation
from rft_cluster.common import stopping
from rft_cluster.common.errors import ClusterError, exit_code
from rft_cluster.common.files import DiskFull, unfinished, write_json
from rft_cluster.learner.snapshot import shards_file
from rft_cluster.run.checkpoints import NewCheckpoint, latest_checkpoint
from rft_cluster.run.saving import BEST, MODEL, Keeper, describe_models, is_complete
from rft_cluster.run.space import journal_bytes
from tests.unit.run.begun import DATASET, TASK, Writing, config


@pytest.fixture(autouse=True)
def no_signal_yet(monkeypatch):
    """A process is stopped once, so it never forgets a signal; these tests stop it again and again."""
    monkeypatch.setattr(stopping, "_received", None)


class Learners:
    def __init__(self, done: bool = True, seconds: float = 0.0) -> None:
        """`done`: whether a file is on the disk at once. `seconds`: that it says to have taken."""
        self.saved: list[int] = []
        self.snapshots: list[int] = []
        self.leaving: list[str] = []
        self.writing: list[Writing] = []
        self._done, self._seconds = done, seconds

    def news_of_leaving(self) -> str:
        return self.leaving.pop(0) if self.leaving else ""

    def take_snapshot(self, step: int) -> None:
        self.snapshots.append(step)

    def checkpoint_bytes(self) -> int:
        return 1000

    def write_checkpoint(self, folder: Path, step: int) -> Writing:
        self.saved.append(step)
        self.writing.append(Writing(folder, step, self._done, self._seconds))
        return self.writing[-1]

    def export(self, folder: Path, files: Mapping[str, Any]) -> None:
        with unfinished(folder) as temporary:
            for name, content in files.items():
                write_json(temporary / name, content)


def keeper(folder: Path, learners: Learners, *overrides: str, step: int = 0) -> Keeper:
    settings = config(folder, *overrides)
    return Keeper(settings, make_card(settings, DATASET, TASK.question, (784, 784)), learners, step, "0123abc")


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
    assert not is_complete(config(tmp_path, "schedule.steps=40"))
    assert is_complete(config(tmp_path, "schedule.steps=40", "data.validation=49")), "too few for a temperature"
    (run / "calibration.json").write_text('{"steps": 40, "models": {}}')
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
                kept._begin(last=True)
                kept._finish()
            if where.startswith("in a step"):
                with kept.step(6):
                    stop()
                    if where == "in a step that fails":
                        raise RuntimeError("an actor died")
            stop()

    assert exit_code(work) == 143
    assert learners.saved == on_disk


def test_a_checkpoint_that_takes_long_is_not_begun_when_stopped(tmp_path, capsys):
    learners = Learners(seconds=25.0)
    kept = keeper(tmp_path, learners, "schedule.save_every=2", "schedule.keep_checkpoints=9")

    def work() -> None:
        with kept.saved_when_stopped():
            steps(kept, 1, 3)
            stop()

    assert exit_code(work) == 143
    assert learners.saved == [2]
    told = "step 3 is not saved: a checkpoint took 25 s, and there are 10 s for it, a third of cluster.grace_seconds"
    assert told in capsys.readouterr().out


def steps(kept: Keeper, first: int, last: int) -> None:
    for step in range(first, last + 1):
        with kept.step(step):
            pass
        kept.save_if_due()


def on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "mine" / "checkpoints").iterdir())


EVERY = ("schedule.save_every=3", "schedule.steps=8", "optimizer.warmup_steps=0")


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path):
    learners = Learners(done=False)
    kept = keeper(tmp_path, learners, *EVERY)
    steps(kept, 1, 4)
    assert on_disk(tmp_path) == ["step-000003.tmp"]
    learners.writing[0].done = True
    steps(kept, 5, 5)
    assert on_disk(tmp_path) == ["step-000003"]
    steps(kept, 6, 7)
    assert on_disk(tmp_path) == ["step-000003", "step-000006.tmp"]
    steps(kept, 8, 8)  # the last step waits: for the one before, and for its own
    assert on_disk(tmp_path) == ["step-000006", "step-000008"]
    state = latest_checkpoint(tmp_path / "mine")[0].state
    assert (state.optimizer_updates, list(state.files), len(state.digests)) == (8, [shards_file(0), shards_file(1)], 2)


def test_a_step_is_saved_and_on_the_disk_before_a_node_leaves(tmp_path, capsys):
    learners = Learners(done=False)
    kept = keeper(tmp_path, learners, "schedule.save_every=100")
    for step in (1, 2, 3):
        learners.leaving = ["10.0.0.3 (learner-1) was told to leave within 28 s"] if step == 2 else []
        with kept.step(step):
            pass
        kept.save_if_due()
    assert learners.saved == [2]
    assert latest_checkpoint(tmp_path / "mine")[0].state.step == 2
    assert capsys.readouterr().out == "10.0.0.3 (learner-1) was told to leave within 28 s: saving step 2 at once\n"


def test_a_notice_that_comes_while_completions_are_written_is_heeded_then(tmp_path, capsys):
    learners = Learners()
    kept = keeper(tmp_path, learners, "schedule.save_every=99")
    notice = "10.0.0.3 (learner-1) was told to leave within 28 s"

    def told() -> str:
        learners.leaving = [notice]
        kept.look_out()
        kept.look_out()
        return capsys.readouterr().out

    assert told() == f"{notice}: no step is done yet\n"
    steps(kept, 1, 1)
    assert learners.saved == []
    assert told() == f"{notice}: saving step 1 at once\n"
    assert learners.saved == [1]
    assert on_disk(tmp_path) == ["step-000001"], "it was waited for"
    assert told() == f"{notice}: step 1 is saved\n"
    with kept.step(2):
        assert told() == f"{notice}: saving step 2 when it is done\n"
        assert learners.saved == [1], "the learners may hold half of it"
    kept.save_if_due()
    assert learners.saved == [1, 2]
    steps(kept, 3, 3)
    assert learners.saved == [1, 2], "once for a notice"


def test_two_checkpoints_are_never_written_at_once(tmp_path):
    learners = Learners(done=False)
    kept = keeper(tmp_path, learners, "schedule.save_every=1")
    begun: list[list[str]] = []
    write = learners.write_checkpoint
    learners.write_checkpoint = lambda folder, step: begun.append(on_disk(tmp_path)) or write(folder, step)
    steps(kept, 1, 3)
    assert begun == [["step-000001.tmp"], ["step-000001", "step-000002.tmp"], ["step-000001", "step-000002",
                     "step-000003.tmp"]]  # fmt: skip


def test_a_model_is_exported_when_the_checkpoint_is_whole(tmp_path):
    kept = keeper(tmp_path, Learners(done=False), "schedule.save_every=1")
    steps(kept, 1, 1)
    kept.keep_if_best(evaluation(1, 0.5))
    assert on_disk(tmp_path) == ["step-000001"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ClusterError("learner-0 (its checkpoint) died while 'writing'"), "learner-0 (its checkpoint) died"),
        (OSError(errno.EIO, "Input/output error", "shard"), "shard: Input/output error: the device reports a fault"),
        (OSError(errno.ENOSPC, "No space left on device", "shard"), "cannot be written: No space left on device"),
    ],
)
def test_a_write_that_fails_costs_a_checkpoint_and_not_the_run(tmp_path, capsys, error, told):
    learners = Learners()
    kept = keeper(tmp_path, learners, *EVERY)
    fail = failing(error)
    write = learners.write_checkpoint

    def write_badly(folder: Path, step: int) -> Writing:
        writing = write(folder, step)
        if step == 6:
            (folder / "half").touch()
            writing.begins = fail
        return writing

    learners.write_checkpoint = write_badly
    steps(kept, 1, 7)
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: step 6 is not saved, and the run goes on: ") and printed.count("\n") == 1
    assert told in printed
    assert on_disk(tmp_path) == ["step-000003"]
    steps(kept, 8, 8)
    assert on_disk(tmp_path) == ["step-000003", "step-000008"]


def test_a_write_that_fails_at_the_last_step_ends_the_run(tmp_path):
    learners = Learners()
    kept = keeper(tmp_path, learners, *EVERY, step=7)
    write = learners.write_checkpoint

    def write_badly(folder: Path, step: int) -> Writing:
        writing = write(folder, step)
        writing.begins = failing(ClusterError("a writer died"))
        return writing

    learners.write_checkpoint = write_badly
    with pytest.raises(ClusterError, match="a writer died"):
        steps(kept, 8, 8)
    assert on_disk(tmp_path) == []


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_after_an_error_the_checkpoint_that_is_being_written_is_completed(tmp_path):
    kept = keeper(tmp_path, Learners(done=False), *EVERY)

    def work() -> None:
        with kept.saved_when_stopped():
            steps(kept, 1, 4)
            raise ClusterError("a learner died")

    with pytest.raises(ClusterError, match="a learner died"):
        work()
    assert on_disk(tmp_path) == ["step-000003"]


def test_the_journal_keeps_what_a_checkpoint_that_is_being_written_may_need(tmp_path, monkeypatch):
    pruned: list[int] = []
    monkeypatch.setattr("rft_cluster.run.saving.prune_journal", lambda run, oldest: pruned.append(oldest))
    learners = Learners(done=False)
    kept = keeper(tmp_path, learners, *EVERY, "schedule.keep_checkpoints=1")
    steps(kept, 1, 5)
    assert pruned == []
    steps(kept, 6, 6)
    assert pruned == [3]


def test_while_there_is_one_checkpoint_the_journal_has_all_steps(tmp_path, monkeypatch):
    """The first may be lost in its upload to a bucket, and then the run goes on from the journal alone."""
    pruned: list[int] = []
    monkeypatch.setattr("rft_cluster.run.saving.prune_journal", lambda run, oldest: pruned.append(oldest))
    kept = keeper(tmp_path, Learners(), *EVERY, "schedule.keep_checkpoints=2")
    steps(kept, 1, 4)
    assert on_disk(tmp_path) == ["step-000003"] and pruned == []
    steps(kept, 5, 7)
    assert on_disk(tmp_path) == ["step-000003", "step-000006"] and pruned == [3]


def test_rows_are_on_the_disk_before_a_checkpoint_of_their_steps(tmp_path, monkeypatch):
    """Else a machine that loses its power keeps the checkpoint alone, and no later run writes these rows."""
    events: list[str] = []
    learners = Learners()
    kept = keeper(tmp_path, learners, *EVERY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr("rft_cluster.run.saving.sync", lambda path: events.append(path.name))
    finish = NewCheckpoint.finish
    monkeypatch.setattr(NewCheckpoint, "finish", lambda *a: events.append("whole") or finish(*a))
    steps(kept, 1, 4)
    assert events == ["metrics.jsonl", "whole"]


def test_snapshots_are_taken_as_often_as_configured(tmp_path):
    learners = Learners()
    steps(keeper(tmp_path, learners, "cluster.snapshot_every=2"), 1, 5)
    assert learners.snapshots == [2, 4]
    never = Learners()
    steps(keeper(tmp_path, never, "cluster.snapshot_every=0"), 1, 5)
    assert never.snapshots == []


@pytest.mark.parametrize("what", ["before", "while writing"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys, what):
    learners = Learners()
    kept = keeper(tmp_path, learners, "schedule.save_every=2", "schedule.steps=8", "optimizer.warmup_steps=0")
    usage = shutil.disk_usage(tmp_path)
    steps(kept, 1, 3)
    with monkeypatch.context() as patch:
        if what == "before":
            patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        else:
            patch.setattr(os, "fsync", lambda _: failing(OSError(errno.ENOSPC, "no space"))())
        steps(kept, 4, 5)
        printed = capsys.readouterr().out
        assert printed.startswith("WARNING: step 4 is not saved, and the run goes on: ") and printed.count("\n") == 1
        assert learners.saved == ([2] if what == "before" else [2, 4])
        with pytest.raises(DiskFull):  # nobody would go on after the last step
            steps(kept, 8, 8)
    assert on_disk(tmp_path) == ["step-000002"]
    kept.save_if_due()
    assert latest_checkpoint(tmp_path / "mine")[0].state.step == 8


@pytest.mark.parametrize(("room", "saved"), [(999, []), (1000, [1])])
def test_a_checkpoint_leaves_the_room_that_the_journal_needs(tmp_path, monkeypatch, capsys, room, saved):
    """The first, too. The journal is written at the same time, and without it the run cannot go on."""
    learners = Learners()
    settings = ("schedule.save_every=1", "schedule.steps=8", "optimizer.warmup_steps=0")
    kept = keeper(tmp_path, learners, *settings)
    journal = journal_bytes(config(tmp_path, *settings))
    (tmp_path / "mine" / "journal").mkdir(parents=True)
    (tmp_path / "mine" / "journal" / "step-000001.jsonl").write_text("x" * 300)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room + journal - 300))
    steps(kept, 1, 1)
    assert learners.saved == saved
    assert ("the files of step-000001, and the journal, need" in capsys.readouterr().out) is (not saved)


def test_no_warning_says_that_a_run_goes_on_which_ends(tmp_path, capsys):
    learners = Learners(done=False)
    kept = keeper(tmp_path, learners, *EVERY)
    steps(kept, 1, 3)
    learners.writing[0].begins = failing(OSError(errno.ENOSPC, "No space left on device", "shard"))
    with pytest.raises(OSError, match="of the journal"), kept.saved_when_stopped():
        raise OSError(errno.ENOSPC, "of the journal")
    assert capsys.readouterr().out.startswith("WARNING: step 3 is not saved: ")


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


def test_a_part_that_goes_on_from_memory_saves_what_a_loss_has_kept_from_the_disk(tmp_path):
    """A learner may die while the last checkpoint is written: the last step is then in memory alone."""
    learners = Learners()
    kept = keeper(tmp_path, learners, "schedule.steps=8", "optimizer.warmup_steps=0", step=8)
    kept.keep_last()
    assert learners.saved == [8]
    again = keeper(tmp_path, learners, "schedule.steps=8", "optimizer.warmup_steps=0", step=8)
    again.keep_last()
    assert learners.saved == [8], "once"


BY_THE_MINUTE = ("schedule.save_minutes=1", "schedule.save_every=0", "schedule.steps=99", "optimizer.warmup_steps=0")


def test_a_run_with_many_losses_still_comes_to_its_next_checkpoint(tmp_path):
    learners = Learners()
    kept = keeper(tmp_path, learners, *BY_THE_MINUTE)
    with kept.step(1):
        pass
    kept.save_if_due(at_once=True)
    (folder,) = (config(tmp_path).run_folder / "checkpoints").iterdir()
    for age, saved in ((30, [1]), (90, [1, 2])):
        os.utime(folder, (time.time() - age,) * 2)
        part = keeper(tmp_path, learners, *BY_THE_MINUTE, step=1)
        with part.step(2):
            pass
        part.save_if_due()
        assert learners.saved == saved


def test_a_run_with_many_losses_comes_to_its_first_checkpoint(tmp_path):
    """Its age is counted from the manifest, which is written once."""
    learners = Learners()
    manifest = config(tmp_path).run_folder / "manifest.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.touch()
    for age, saved in ((30, []), (90, [2])):
        os.utime(manifest, (time.time() - age,) * 2)
        part = keeper(tmp_path, learners, *BY_THE_MINUTE)
        for step in (1, 2):
            with part.step(step):
                pass
        part.save_if_due()
        assert learners.saved == saved
