"""End a command in the same way for Ctrl-C, SIGTERM (Slurm, Kubernetes, `ray job stop`) and SIGHUP (closed terminal).

The first signal raises KeyboardInterrupt in the main thread, so every `finally` runs. A second one ends the process at
once, unless it comes with the first: a closed terminal, `timeout make` and systemd send one to the group and one that a
parent passes on. A timer ends the process after `PATIENCE`, in case the exception got lost or the clean-up hangs. Both
limits suit a grace of 30 s, as Kubernetes gives by default; `grant` changes them.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 60.0  # seconds from a signal to the end by force
# Seconds that a signal waits at most for the current step to finish, and a save that follows for its end.
WHOLE = 10.0
ONE_EVENT = 1.0  # seconds in which several signals count as one; nobody gives up on a clean end so soon

_taken = False  # inside `stoppable`
_received: signal.Signals | None = None
_received_at = 0.0
_whole_first = False  # inside `whole`


def grant(grace: float) -> None:
    """Use `grace` seconds from a signal to the kill (`cluster.grace_seconds`): a third each for the current step, for a
    checkpoint that is being written, and for a last one.

    A long grace is one that the place keeps, so the end by force comes with it: a scheduler that has to kill does not
    start the run again. A short one may be Ctrl-C at a desk, where nobody kills.
    """
    global WHOLE, PATIENCE
    WHOLE, PATIENCE = grace / 3, min(2 * grace, max(60.0, grace))


def received() -> signal.Signals | None:
    """The signal that is ending this process, if any."""
    return _received


@contextmanager
def stoppable() -> Iterator[None]:
    """Handle the signals within this context. In the main thread only."""
    global _taken, _received
    _taken, _received = True, None
    # Ray reads this on import. Without it, a SIGTERM during Ray's start prints a C++ stack trace.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGALRM)}
    take_signals()
    try:
        yield
    finally:
        _taken = False
        if _received:  # without a signal, the timer is not ours
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_quietly() -> None:
    """End the process with one line on a signal. For the time while a command is loaded: nothing to clean up yet."""
    _take(_end)


def take_signals() -> None:
    """Install the handlers again inside `stoppable`: libraries replace them (Ray replaces SIGTERM's)."""
    if _taken:
        _take(_stop)


def _take(handler: Callable[[int, FrameType | None], None]) -> None:
    """Install `handler` for all signals, except for an ignored SIGHUP: `nohup` means that the command shall go on.

    An ignored SIGINT (shells do so for background jobs) is handled: whoever sends it then, does so on purpose.
    """
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stop_for(number: signal.Signals) -> KeyboardInterrupt:
    """The exception to raise for a signal that did not come through the handlers here."""
    global _received, _received_at
    _received, _received_at = number, time.monotonic()
    return KeyboardInterrupt()


@contextmanager
def whole() -> Iterator[None]:
    """Delay a signal to the end of this context, by `WHOLE` seconds at most, so that the work in it is completed."""
    global _whole_first
    _whole_first = True
    try:
        yield
    except BaseException:
        _whole_first = False
        if _received:  # the work failed by itself after the signal: the clean-up has the time that it always has
            _wait_until_patience_ends()
        raise
    _whole_first = False
    if _received:
        _raise()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    global _received, _received_at
    if _received:
        if time.monotonic() - _received_at < ONE_EVENT:
            return
        os._exit(128 + number)
    _received, _received_at = signal.Signals(number), time.monotonic()
    if _whole_first:
        _wait_at_most(WHOLE)
    else:
        _raise()


def _raise() -> None:
    _wait_until_patience_ends()
    raise KeyboardInterrupt


def _wait_until_patience_ends() -> None:
    _wait_at_most(max(0.01, _received_at + PATIENCE - time.monotonic()))


def _wait_at_most(seconds: float) -> None:
    signal.signal(signal.SIGALRM, _out_of_patience)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _out_of_patience(number: int, frame: FrameType | None) -> None:
    global _whole_first
    assert _received
    if _whole_first:
        _whole_first = False
        _raise()
    os._exit(128 + _received)
