"""Before the driver of a run over nodes starts, all of them have joined; else a scheduler may try again."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from rft_cluster.common import errors

SCRIPT = Path(__file__).parents[3] / "deploy" / "when_ready.py"


@pytest.fixture
def address(monkeypatch) -> Iterator[str]:
    """Of a head: something listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", found)
        yield found


@pytest.fixture
def ray(monkeypatch) -> SimpleNamespace:
    """One of a living node and a dead one."""
    nodes = [{"Alive": True}, {"Alive": False}]
    fake = SimpleNamespace(init=lambda **options: None, nodes=lambda: nodes, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.fixture
def when_ready(monkeypatch, ray):
    """Without patience; starting a command ends it."""
    spec = importlib.util.spec_from_file_location("when_ready", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "execvp", start)
    return module


def start(command: str, words: list[str]) -> None:
    raise SystemExit(" ".join(words))


def test_a_part_that_is_lost_has_the_exit_code_of_the_package(when_ready):
    """It is written down twice: the script needs nothing but Ray."""
    assert when_ready.PART_LOST == errors.PART_LOST


def test_a_head_that_does_not_come_up_is_a_part_that_is_lost(when_ready, ray, monkeypatch, capsys):
    """Ray is not asked before something listens there: an attempt of its own takes half a minute."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    ray.init = None
    assert when_ready.main(1, ["echo"]) == errors.PART_LOST
    said = capsys.readouterr().err
    assert said == "error: no Ray at 127.0.0.1:9 ([Errno 111] Connection refused) within 0 s\n"


@pytest.mark.parametrize("given", ["HOST:PORT", "auto"])
def test_a_head_that_is_not_ready_is_a_part_that_is_lost(when_ready, ray, address, monkeypatch, capsys, given: str):
    def refuse(**options: object) -> None:
        raise ConnectionError("not yet")

    ray.init = refuse
    if given == "auto":
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert when_ready.main(1, ["echo"]) == errors.PART_LOST
    assert capsys.readouterr().err == f"error: no Ray at {os.environ['RAY_ADDRESS']} (not yet) within 0 s\n"


def test_a_node_that_does_not_join_is_a_part_that_is_lost(when_ready, address, capsys):
    """A node that died is none."""
    assert when_ready.main(2, ["echo"]) == errors.PART_LOST
    assert capsys.readouterr().err == f"error: 1 of 2 nodes joined {address} within 0 s\n"


def test_the_command_starts_when_the_last_node_has_joined(when_ready, ray, address, monkeypatch, capsys):
    monkeypatch.setattr(when_ready, "PATIENCE", 60.0)
    seen = [1, 2, 3]
    ray.nodes = lambda: [{"Alive": True}] * seen.pop(0)
    with pytest.raises(SystemExit, match="echo go on"):
        when_ready.main(3, ["echo", "go on"])
    assert (seen, capsys.readouterr().out) == ([], f"3 nodes have joined {address}\n")


@contextmanager
def waiting(head: str, **environment: str) -> "Iterator[subprocess.Popen[str]]":
    """The script with the real Ray. Its head is away, or something silent listens there, and Ray waits for it."""
    with socket.create_server(("", 0)) as server:  # Ray takes 127.0.0.1 for this host's address
        port = server.getsockname()[1] if head == "silent" else 9
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "1", "echo", "go"], stderr=subprocess.PIPE, text=True,
            env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{port}", **environment},
        )  # fmt: skip
        try:
            if head == "silent":
                server.settimeout(60)
                for _ in range(2):  # the first connection only tries the port; the second is Ray's
                    server.accept()
                time.sleep(1)
            else:
                time.sleep(3)
            assert process.poll() is None
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("head", ["away", "silent"])
def test_sigterm_ends_the_wait_at_once_and_as_a_signal_does(head: str):
    """A scheduler queues such a job again. Ray's own handler would end it with 15, and half a minute later."""
    with waiting(head) as process:
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (-signal.SIGTERM, 143)
        assert time.monotonic() - told < 2


@pytest.mark.parametrize("head", ["away", "silent"])
def test_nobody_waits_for_a_node_whose_ray_has_ended(head: str):
    """Of the head, or of another node."""
    with subprocess.Popen(["sleep", "60"]) as node, waiting(head, RFT_RAY_PIDS=f"{os.getpid()} {node.pid}") as process:
        node.kill()
        node.wait()
        ended = time.monotonic()
        said = process.communicate(timeout=30)[1].splitlines()[-1]
        assert time.monotonic() - ended < 3
        assert process.returncode == errors.PART_LOST
        assert said.startswith("error: Ray of a node of 127.0.0.1:") and f"(process {node.pid}): see its log" in said
