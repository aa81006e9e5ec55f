"""What is left of processes that are started beside the driver. Real runs: test_stopped.py."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rft_cluster.cluster.leftovers import CACHE, without_leftovers

NAMES = ("RAY_TMPDIR", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "SPT_NOENV")
STARTED = """
import os, signal, tempfile, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), tempfile.mkdtemp(), tempfile.mkstemp()[1], flush=True)
time.sleep(100)
"""
DRIVER = f"""
import subprocess, sys
from rft_cluster.cluster import leftovers
leftovers.GRACE = 0
with leftovers.without_leftovers():
    subprocess.Popen([sys.executable, "-c", {STARTED!r}], start_new_session=True)
sys.stdin.read()
"""


def is_alive(pid: int) -> bool:
    """A zombie waits for a parent to ask, and in a container without an init nobody asks."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def drive(folder: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """Start the driver, which ends with its input, and return what the process that it starts says."""
    command, environment = [sys.executable, "-c", DRIVER], os.environ | {"RAY_TMPDIR": str(folder)}
    driver = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdin and driver.stdout
    return driver, driver.stdout.readline().split()


def wait_until_gone(pid: int, folder: Path) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid) or list(folder.iterdir()):
        assert time.monotonic() < deadline, (pid, list(folder.iterdir()))
        time.sleep(0.01)


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGKILL])
def test_files_and_processes_go_with_the_driver_however_that_ends(tmp_path, number):
    other = subprocess.Popen(["sleep", "100"], env=os.environ | {"RAY_TMPDIR": str(tmp_path)})
    driver, (pid, *made) = drive(tmp_path)
    (own,) = {Path(path).parent for path in made}
    assert own.parent == tmp_path
    if number:
        assert is_alive(int(pid)), "nothing is touched while the driver lives"
        assert all(map(os.path.exists, made))
        driver.send_signal(number)
    driver.stdin.close()  # without a signal it ends by itself
    assert driver.wait(10) == -(number or 0)
    wait_until_gone(int(pid), tmp_path)
    assert other.poll() is None, "a process of others"
    other.kill()
    other.wait()


def test_a_signal_before_anybody_waits_for_the_end_leaves_no_folder(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", stopped)
    with pytest.raises(KeyboardInterrupt), without_leftovers():
        raise AssertionError("nobody would remove its folder")
    assert not list(tmp_path.iterdir())


def test_notes_of_openmp_about_dead_processes_go_too(tmp_path):
    living, dead = subprocess.Popen(["sleep", "100"]), subprocess.Popen(["true"])
    dead.wait()
    notes = [Path(f"/dev/shm/__KMP_REGISTERED_LIB_{process.pid}_{os.getuid()}") for process in (living, dead)]
    try:
        for note in notes:
            note.touch()
        driver, started = drive(tmp_path)
        driver.stdin.close()  # it ends by itself
        wait_until_gone(int(started[0]), tmp_path)
        assert [note.exists() for note in notes] == [True, False]
    finally:
        notes[0].unlink()
        living.kill()
        living.wait()


def test_only_what_is_started_there_sees_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/own/cache")
    monkeypatch.delenv("TMPDIR", raising=False)
    before = [os.environ.get(name) for name in NAMES]
    with suppress(InterruptedError), without_leftovers():
        (own,) = tmp_path.iterdir()
        assert [os.environ[name] for name in NAMES] == [str(tmp_path), str(own), "/own/cache", "1"]
        assert own.stat().st_mode & 0o777 == 0o700
        raise InterruptedError
    assert [os.environ.get(name) for name in NAMES] == before
    assert not tempfile.gettempdir().startswith(str(own))


def test_what_torch_compiles_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with without_leftovers():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(CACHE.expanduser())
