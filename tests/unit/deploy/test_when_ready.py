"""Before the driver of a run over nodes starts, all of them have joined; else a scheduler may try again."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from rft_cluster.common import errors

SCRIPT = Path(__file__).parents[3] / "deploy" / "when_ready.py"
ADDRESS = "10.0.0.1:6379"


@pytest.fixture
def when_ready(monkeypatch):
    """With a Ray of one living node and one dead one, and without patience; starting a command ends it."""
    spec = importlib.util.spec_from_file_location("when_ready", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("RAY_ADDRESS", ADDRESS)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.ray, "init", lambda **options: None)
    monkeypatch.setattr(module.ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    monkeypatch.setattr(module.ray, "shutdown", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(os, "execvp", start)
    return module


def start(command: str, words: list[str]) -> None:
    raise SystemExit(" ".join(words))


def test_a_part_that_is_lost_has_the_exit_code_of_the_package(when_ready):
    """It is written down twice: the script needs nothing but Ray."""
    assert when_ready.PART_LOST == errors.PART_LOST


def test_a_head_that_does_not_come_up_is_a_part_that_is_lost(when_ready, monkeypatch, capsys):
    def refuse(address: str, **options: object) -> None:
        raise ConnectionError(f"nobody at {address}")

    monkeypatch.setattr(when_ready.ray, "init", refuse)
    assert when_ready.main(1, ["echo"]) == errors.PART_LOST
    assert capsys.readouterr().err == f"error: no Ray at {ADDRESS} within 0 s: nobody at {ADDRESS}\n"


def test_a_node_that_does_not_join_is_a_part_that_is_lost(when_ready, capsys):
    """A node that died is none."""
    assert when_ready.main(2, ["echo"]) == errors.PART_LOST
    assert capsys.readouterr().err == f"error: 1 of 2 nodes joined {ADDRESS} within 0 s\n"


def test_the_command_starts_when_the_last_node_has_joined(when_ready, monkeypatch, capsys):
    monkeypatch.setattr(when_ready, "PATIENCE", 60.0)
    seen = [1, 2, 3]
    monkeypatch.setattr(when_ready.ray, "nodes", lambda: [{"Alive": True}] * seen.pop(0))
    with pytest.raises(SystemExit, match="echo go on"):
        when_ready.main(3, ["echo", "go on"])
    assert (seen, capsys.readouterr().out) == ([], f"3 nodes have joined {ADDRESS}\n")
