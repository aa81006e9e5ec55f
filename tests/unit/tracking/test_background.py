import threading
from pathlib import Path

import pytest

from rft_cluster.classification.report import Evaluation
from rft_cluster.run.folder import RunFolder
from rft_cluster.tracking import background
from rft_cluster.tracking.background import Background
from tests.unit.run.begun import TASK, config
from tests.unit.run.steps import ADVANTAGES, GROUPS, REWARDS, stats


class Listener:
    """A tracker that notes what it gets, and may fail or wait at it."""

    def __init__(self, fails_at: str = "", waits: threading.Event | None = None) -> None:
        self.got: list[object] = []
        self._fails_at, self._waits = fails_at, waits

    def _note(self, name: str, what: object = None) -> None:
        if self._waits:
            self._waits.wait()
        if name == self._fails_at:
            raise ConnectionError("\x1b[31mno network")
        self.got.append((name, what))

    def begin(self, first_step):
        self._note("begin", first_step)

    def step(self, stats):
        self._note("step", stats.step)

    def rollouts(self, step, rows):
        self._note("rollouts", (step, [row["label"] for row in rows]))

    def evaluation(self, evaluation, judged):
        self._note("evaluation", (evaluation.split, [one.predicted for one in judged]))

    def close(self):
        self._note("close")


def a_run(folder: Path, tracker: Background) -> None:
    run = RunFolder(config(folder), TASK, 0, trackers=[tracker])
    run.log_evaluation(Evaluation(0, "test", 0.25, 0.3, 0.5, 2, (0.1, 0.4)), GROUPS)
    run.log_rollouts(1, GROUPS, REWARDS, ADVANTAGES, None)
    run.log_step(stats(1))
    RunFolder(config(folder), TASK, 1, trackers=[tracker]).log_step(stats(2))


def test_every_record_of_a_run_arrives_in_order(tmp_path):
    listener = Listener()
    tracker = Background("ours", listener)
    a_run(tmp_path, tracker)
    tracker.close()
    assert listener.got == [
        ("begin", 0),
        ("evaluation", ("test", [None, None])),
        ("rollouts", (1, ["seven", "seven"])),
        ("step", 1),
        ("begin", 1),
        ("step", 2),
        ("close", None),
    ]


@pytest.mark.parametrize("where", ["begin", "step", "close"])
def test_a_tracker_that_fails_is_given_up_with_one_line_and_the_run_goes_on(tmp_path, capsys, where):
    listener = Listener(fails_at=where)
    tracker = Background("ours", listener)
    a_run(tmp_path, tracker)
    tracker.close()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: the run goes on without ours: ConnectionError: ?[31mno network"]
    assert ("step", 2) not in listener.got or where == "close"
    assert (tmp_path / "mine" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_tracker_that_hangs_holds_up_nothing(monkeypatch, capsys):
    monkeypatch.setattr(background, "MOST_WAITING", 3)
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.01)
    forever = threading.Event()
    try:
        slow, few = Background("slow", Listener(waits=forever)), Background("few", Listener(waits=forever))
        for step in range(1, 9):
            slow.step(stats(step))
        few.begin(0)
        slow.close()
        few.close()
    finally:
        forever.set()
    assert capsys.readouterr().out.splitlines() == [
        "note: the run goes on without slow: it is 3 records behind",
        "note: the run goes on without few: it has not taken everything within 0.01 s",
    ]
