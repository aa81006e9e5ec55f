import signal

import pytest

from rft_cluster.common.errors import ClusterError
from rft_cluster.run import restarts
from rft_cluster.run.records import append
from rft_cluster.run.restarts import Restarts
from tests.unit.run.begun import begun, config


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", slept.append)
    return slept


def test_the_losses_of_each_actor_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("rft_cluster.run.restarts.time.sleep", lambda _: None)
    left = Restarts(config(tmp_path, "cluster.restarts=3"))
    left.again(ClusterError("lost", ["generator-0"]), "it starts afresh")
    left.again(ClusterError("lost", ["generator-0", "learner-1"]), "they start afresh")
    left.again(ValueError("an answer is wrong"), "it is asked again")
    assert left.lost == {"generator-0": 2, "learner-1": 1}
    assert not left.again(ClusterError("lost", ["reward"]), "it starts afresh")
    assert "reward" not in left.lost, "the run has ended"


def test_losses_are_counted_anew_after_each_new_step(tmp_path, pauses, capsys):
    run = begun(tmp_path)
    left = Restarts(config(tmp_path, "cluster.restarts=2"))
    error = ClusterError("learner-0 died")
    asked = []
    for steps in (0, 0, 3, 3, 3, 4, 4, 4):
        for step in range(1, steps + 1):
            append(run / "metrics.jsonl", {"step": step})
        asked.append(left.again(error, "it starts afresh"))
    assert asked == [True, True, True, True, False, True, True, False]
    assert pauses == [4, 4, 4], "the first loss is made good at once"
    assert capsys.readouterr().out.count("WARNING: learner-0 died\nit starts afresh (1 of 2 times") == 3


def test_fewer_steps_than_before_are_no_progress(tmp_path, pauses):
    """A run that starts again does the steps since its checkpoint again: their records are moved aside first."""
    run = begun(tmp_path)
    left = Restarts(config(tmp_path, "cluster.restarts=1"))
    append(run / "metrics.jsonl", {"step": 9})
    assert left.again(ClusterError("lost"), "it starts afresh")
    (run / "metrics.jsonl").write_text("")
    append(run / "metrics.jsonl", {"step": 8})
    assert not left.again(ClusterError("lost"), "it starts afresh")


def test_none_are_made_where_none_are_wanted(tmp_path, pauses):
    assert not Restarts(config(tmp_path, "cluster.restarts=0")).again(ClusterError("lost"), "it starts afresh")
    assert pauses == []


def test_the_pause_has_a_limit(tmp_path, pauses):
    left = Restarts(config(tmp_path, "cluster.restarts=9"))
    assert all(left.again(ClusterError("lost"), "it starts afresh") for _ in range(9))
    assert pauses == [4, 8, 16, 32, 60, 60, 60, 60]


def test_after_a_signal_nothing_is_replaced(tmp_path, pauses, monkeypatch):
    """The losses are its consequences."""
    monkeypatch.setattr(restarts.stopping, "received", lambda: signal.SIGTERM)
    assert not Restarts(config(tmp_path, "cluster.restarts=9")).again(ClusterError("lost"), "it starts afresh")
