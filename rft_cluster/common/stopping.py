"""Ctrl-C, SIGTERM (Slurm, Kubernetes, `ray job stop`) and SIGHUP (a closed terminal) end a command alike.

The first of them is raised in the main thread as KeyboardInterrupt, which every `finally` sees; the second ends the
process at once. So does the first after `PATIENCE`, should what it raised have been lost or the tidying up hang.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 60.0  # seconds from a signal to the end by force
# At most this many seconds are waited for what is under way to become whole. Kubernetes kills 30 s after SIGTERM.
WHOLE = 10.0

_taken = False  # inside `stoppable`
_received: signal.Signals | None = None
_whole_first = False  # inside `whole`


def received() -> signal.Signals | None:
    """The signal that is ending this process."""
    return _received


@contextmanager
def stoppable() -> Iterator[None]:
    """Take the signals while a command works. In the main thread only."""
    global _taken, _received
    _taken, _received = True, None
    # Read when Ray is imported: a SIGTERM while it starts would be answered with a C++ stack.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGALRM)}
    take_signals()
    try:
        yield
    finally:
        _taken = False
        if _received:  # else the timer is somebody else's
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_quietly() -> None:
    """While a command is loaded nothing is there to tidy up: a signal ends it with one line."""
    _take(_end)


def take_signals() -> None:
    """Take them again, if a command works here: libraries install handlers of their own (Ray one of SIGTERM)."""
    if _taken:
        _take(_stop)


def _take(handler: Callable[[int, FrameType | None], None]) -> None:
    """SIGINT is taken even where a shell has it ignored in the background: it was sent by hand then. SIGHUP is not: who
    has it ignored (nohup) wants the command to go on."""
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stop_for(number: signal.Signals) -> KeyboardInterrupt:
    """What to raise for a signal that arrived in another way than by its handler here."""
    global _received
    _received = number
    return KeyboardInterrupt()


@contextmanager
def whole() -> Iterator[None]:
    """A signal in here is raised at its end, so that what it does is done whole; but never later than `WHOLE`."""
    global _whole_first
    _whole_first = True
    try:
        yield
    finally:
        _whole_first = False
    if _received:
        _raise()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    if _received:
        os._exit(128 + number)
    _received = signal.Signals(number)
    if _whole_first:
        _wait_at_most(WHOLE)
    else:
        _raise()


def _raise() -> None:
    _wait_at_most(PATIENCE)
    raise KeyboardInterrupt


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
