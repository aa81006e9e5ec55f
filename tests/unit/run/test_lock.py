"""Two processes and one run folder."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.run import lock
from rft_cluster.run.lock import LOCK_FILE, holder, locked

HOLDER = """
import sys, time
from pathlib import Path
from rft_cluster.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_process_is_told_who_holds_it(tmp_path):
    folder = tmp_path / "runs" / "mine"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        said = re.escape(f"{folder}: another process is running it (pid {process.pid} on {socket.gethostname()} since ")
        with pytest.raises(UserError, match=said), locked(folder):
            pass
        assert re.match(said, holder(folder))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # However it ended, its lock ended with it.
    assert holder(folder) is None
    with locked(folder):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (folder / LOCK_FILE).exists()


def test_who_only_asks_keeps_nobody_out(tmp_path, monkeypatch):
    """`watch` asks for the holder again and again, and takes a shared lock for that moment."""
    (tmp_path / LOCK_FILE).touch()  # a killed process left it
    asking = (tmp_path / LOCK_FILE).open()
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, "sleep", lambda _: asking.close())  # the moment is over
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("comes_free", [True, False])
def test_the_lock_of_another_machine_is_waited_for_as_long_as_nfs_keeps_it(tmp_path, monkeypatch, capsys, comes_free):
    monkeypatch.setattr(lock, "LEASE", 60.0 if comes_free else 0.5)
    dead = tmp_path / LOCK_FILE
    dead.write_text(json.dumps({"pid": 1, "host": "node-7", "since": "x"}))
    with dead.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if comes_free:
            threading.Timer(0.5, held.close).start()
            with locked(tmp_path):
                assert json.loads(dead.read_text())["pid"] == os.getpid()
        else:
            with pytest.raises(UserError, match=f"if node-7 is gone, remove {dead}"), locked(tmp_path):
                pass
    said = capsys.readouterr().out
    assert f"{tmp_path}: another process is running it (pid 1 on node-7 since x)" in said
    assert said.count("waiting") == 1


def test_of_many_at_once_one_gets_it(tmp_path):
    folder = tmp_path / "mine"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    losers = []
    while len(losers) < 3:
        time.sleep(0.05)
        losers = [process for process in started if process.poll() is not None]
    (winner,) = set(started) - set(losers)
    assert all("another process is running it" in process.communicate()[1] for process in losers)
    assert winner.stdout.readline() == "held\n"
    winner.kill()
    winner.communicate()


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    (tmp_path / "there").mkdir()
    with locked(tmp_path / "there" / "runs" / "mine"):
        pass
    assert not list((tmp_path / "there").iterdir())
    with locked(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()
    with locked(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", ["a" * 300, "dangling/mine"])
def test_where_nothing_can_be_written_it_is_said(tmp_path, name):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot be written.*Set run\.folder"), locked(tmp_path / name):
        pass


def test_a_lock_that_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Between opening the file and locking it, its last holder removes it."""
    real, removed = fcntl.flock, []

    def flock(descriptor, kind):
        if not removed:
            removed.append((tmp_path / LOCK_FILE).unlink())
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        (None, True),
        ({"pid": os.getpid(), "host": socket.gethostname(), "since": "x"}, False),
        ({"pid": 2**22 + 7, "host": socket.gethostname(), "since": "x"}, True),
        ({"pid": 1, "host": "node-7", "since": "x"}, False),
    ],
)
def test_where_the_file_system_has_no_locks_the_file_decides(tmp_path, monkeypatch, owner, free):
    def flock(descriptor, kind):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    if owner:
        (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
    if not free:
        with pytest.raises(UserError, match="another process is running it") as refused, locked(tmp_path):
            pass
        assert ("if node-7 is gone, remove" in str(refused.value)) == (owner["host"] == "node-7")
        (tmp_path / LOCK_FILE).unlink()  # the cure
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
