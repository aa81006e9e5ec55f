"""Signals to a process of its own, which says on its output how far it is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rft_cluster.common import stopping

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PROGRAM = """
import sys, time
from rft_cluster.common import stopping
from rft_cluster.common.errors import UserError, exit_code

def say(word):
    print(word, flush=True)

def wait():
    # Not one long sleep: Python notes a signal that comes just before a sleep begins, and sleeps to the end.
    for _ in range(400):
        time.sleep(0.05)

def until_it_came():
    while stopping.received() is None:
        time.sleep(0.01)

def plain():
    say("ready"); wait()

def says_where():
    try:
        say("ready"); wait()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("step 3 is saved")

def tidies_up():
    try:
        say("ready"); wait()
    finally:
        say("tidied")

def tidies_up_slowly():
    try:
        say("ready"); wait()
    finally:
        say("tidying"); time.sleep(0.3); say("tidied")

def fails_meanwhile():
    try:
        say("ready"); wait()
    finally:
        raise RuntimeError("an actor died")

def is_refused_meanwhile():
    try:
        say("ready"); wait()
    finally:
        raise UserError("an actor says so")

def whole():
    with stopping.whole():
        say("ready"); until_it_came(); say("whole")
    say("not reached")

def never_whole():
    stopping.grant(0.6)
    with stopping.whole():
        say("ready"); wait(); say("not reached")

def fails_inside_whole():
    stopping.grant(6)  # 2 for the work, and 12 in all
    try:
        with stopping.whole():
            say("ready"); until_it_came(); raise OSError("the disk is full")
    finally:
        time.sleep(0.5); say("tidied")

def handler_is_taken_away():
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    stopping.take_signals()
    plain()

def loses_it():
    stopping.grant(0.1)
    try:
        plain()
    except KeyboardInterrupt:
        wait()

def is_slow_to_end():
    try:
        plain()
    except KeyboardInterrupt:
        say("ending"); wait()

sys.exit(exit_code(globals()[sys.argv[1]]))
"""


@pytest.fixture(autouse=True)
def nothing_is_ignored() -> Iterator[None]:
    """Under nohup SIGHUP is ignored here, and so in every process that is started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(work: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, work], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def signalled(work: str, number: signal.Signals, **options) -> subprocess.Popen:
    """A process that got a signal when it was at work."""
    process = start(work, **options)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    return process


def signalled_twice(work: str, number: signal.Signals, meanwhile: str, apart: float) -> tuple[int, str, str]:
    """How a process ends that got another signal `apart` seconds after it said what it does `meanwhile`."""
    process = signalled(work, number)
    assert process.stdout.readline() == meanwhile
    time.sleep(apart)
    process.send_signal(number)
    return end(process)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    printed, error = process.communicate(timeout=10)
    return process.returncode, printed, error


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("work", "printed", "error"),
    [
        ("plain", "", "interrupted\n"),
        ("says_where", "", "step 3 is saved\n"),
        ("tidies_up", "tidied\n", "interrupted\n"),
        ("fails_meanwhile", "", "interrupted\n"),
        ("is_refused_meanwhile", "", "interrupted\n"),
        ("whole", "whole\n", "interrupted\n"),
        ("never_whole", "", "interrupted\n"),
        ("fails_inside_whole", "tidied\n", "interrupted\n"),
        ("handler_is_taken_away", "", "interrupted\n"),
        ("loses_it", "", ""),
    ],
)
def test_a_signal_ends_a_command_with_one_line(work: str, printed: str, error: str, number: signal.Signals):
    assert end(signalled(work, number)) == (128 + number, printed, error)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_the_second_signal_ends_it_at_once(number: signal.Signals):
    assert signalled_twice("is_slow_to_end", number, "ending\n", stopping.ONE_EVENT) == (128 + number, "", "")


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_two_signals_of_one_event_are_one(number: signal.Signals):
    """A closed terminal sends one to every process of a group, and `make` passes its own on."""
    found = signalled_twice("tidies_up_slowly", number, "tidying\n", 0)
    assert found == (128 + number, "tidied\n", "interrupted\n")


@pytest.mark.parametrize(("grace", "patience"), [(0.1, 0.2), (30, 60), (50, 60), (70, 70), (540, 540)])
def test_a_long_grace_ends_by_force_before_its_place_kills(monkeypatch, grace: float, patience: float):
    monkeypatch.setattr(stopping, "WHOLE", stopping.WHOLE)
    monkeypatch.setattr(stopping, "PATIENCE", stopping.PATIENCE)
    stopping.grant(grace)
    assert grace / 3 == stopping.WHOLE
    assert patience == stopping.PATIENCE


def test_what_nohup_ignores_stays_ignored():
    process = signalled("plain", signal.SIGHUP, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


def test_a_background_job_of_a_script_takes_ctrl_c_sent_by_hand():
    process = signalled("plain", signal.SIGINT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert end(process)[0] == 130


def test_afterwards_signals_are_what_they_were():
    from rft_cluster.common.errors import exit_code

    before = [signal.getsignal(number) for number in STOPPING]
    timer = signal.getitimer(signal.ITIMER_REAL)[0]  # of this test's own time limit
    assert exit_code(lambda: None) == 0
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer > 0)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["launch", "evaluate", "predict", "sweep", "compare"])
def test_a_command_that_is_still_loading_ends_with_one_line(tmp_path: Path, name: str, number: signal.Signals):
    """The signal comes with the first module of its own that the command imports."""
    (tmp_path / "argparse.py").write_text(f"import os, time\nos.kill(os.getpid(), {number.value})\ntime.sleep(20)\n")
    found = subprocess.run(
        [sys.executable, "-m", f"rft_cluster.{name}"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout, found.stderr) == (128 + number, "", "interrupted\n")
