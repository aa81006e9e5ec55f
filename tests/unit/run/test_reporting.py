"""The process that writes a run's report: whatever becomes of it, the run goes on and no process is left."""

import os
import sys
import time
from contextlib import suppress

import pytest

from rft_cluster.classification.report import Evaluation
from rft_cluster.run import reporting
from rft_cluster.run.reporting import Reports
from tests.unit.report.whole import written

EVALUATION = Evaluation(4, "test", 0.5, 0.5, 1.0, 20, (0.3, 0.7))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_last_report_is_there_when_the_run_ends(tmp_path, capsys):
    run = written(tmp_path)
    with Reports(run) as reports:
        reports.finish()
    assert "<!doctype html>" in (run / "report.html").read_text()[:20]
    assert capsys.readouterr().out.endswith(f"the report, for a browser: {run / 'report.html'}\n")
    assert not list(run.glob("*.tmp"))


def test_a_report_that_fails_is_said_and_the_run_goes_on(tmp_path, capsys):
    run = tmp_path / "my runs"
    run.mkdir()
    with Reports(run) as reports:
        reports.finish()
    said = capsys.readouterr().out
    assert said.startswith("note: the report was not written (error: ") and "is not the folder of a run" in said
    assert said.endswith(f"python -m rft_cluster.report '{run}'\n"), "for a shell"


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A command that takes a minute, in place of the report's."""
    monkeypatch.setattr(reporting, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    return tmp_path


def test_one_is_written_at_a_time_with_the_least_priority_and_none_is_left(slow):
    with suppress(KeyboardInterrupt), Reports(slow) as reports:
        reports.evaluation(EVALUATION, [])
        pid = reports._process.pid
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        reports.evaluation(EVALUATION, [])
        assert reports._process.pid == pid
        begun = time.monotonic()
        raise KeyboardInterrupt  # Ctrl-C, in the run
    assert not alive(pid) and time.monotonic() - begun < 30


def test_the_run_does_not_wait_for_ever(slow, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "LAST_WITHIN", 0.2)
    with Reports(slow) as reports:
        reports.finish()
    assert "note: the report took more than 0 s" in capsys.readouterr().out


def test_a_report_that_cannot_be_begun_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "COMMAND", (str(tmp_path / "python"),))  # or there is no memory for a process
    with Reports(tmp_path) as reports:
        reports.evaluation(EVALUATION, [])
        reports.finish()
    assert capsys.readouterr().out.startswith("note: the report was not written ([Errno 2] No such file")
