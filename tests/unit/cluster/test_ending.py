"""Actors are ended, frozen ones too, and nobody else."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from rft_cluster.cluster import ending
from rft_cluster.cluster.ending import end, kill_process

SOON = 10  # seconds


@contextmanager
def process(title: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits, with a title as Ray gives one to an actor."""
    with subprocess.Popen(["bash", "-c", f"exec -a '{title}' sleep 60"]) as started:
        try:
            while True:  # until bash has become the other
                with open(f"/proc/{started.pid}/cmdline", "rb") as words:
                    if words.read().startswith(title.encode()):
                        break
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_process_of_the_actor_s_class_is_killed(frozen):
    with process("ray::Learner.update") as learner:
        if frozen:
            learner.send_signal(signal.SIGSTOP)
        kill_process(learner.pid, "Learner")
        assert learner.wait(SOON) == -signal.SIGKILL


def test_whoever_has_its_number_by_now_is_left_alone():
    with process("ray::Generator.generate") as other:
        kill_process(other.pid, "Learner")
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.2)


def test_a_process_that_has_ended_is_no_error():
    with process("ray::Learner") as learner:
        learner.kill()
        learner.wait(SOON)
    kill_process(learner.pid, "Learner")


@pytest.mark.parametrize("started", [True, False])
def test_an_actor_is_asked_to_end_and_killed_on_its_node_if_it_has_a_process(monkeypatch, started):
    said: list[Any] = []
    table = {"Pid": 7337, "ActorClassName": "Learner", "Address": {"NodeID": "ab" * 28}}
    monkeypatch.setattr(ending, "actors", lambda _: table if started else table | {"Pid": 0})
    monkeypatch.setattr(ending.ray, "kill", lambda handle: said.append("asked"))

    def options(**where: Any) -> Any:
        said.append(where["scheduling_strategy"].node_id)
        return SimpleNamespace(remote=lambda *arguments: said.append(arguments))

    monkeypatch.setattr(ending, "KILL", SimpleNamespace(options=options))
    end([SimpleNamespace(_actor_id=bytes(16))])
    assert said == (["asked", "ab" * 28, (7337, "Learner")] if started else ["asked"])
