"""The one exception for a mistake that its user can mend, and what it means to an entry point."""

import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from rft_cluster.common import stopping


class UserError(Exception):
    """Bad input or a cluster that cannot run what was asked.

    The message says what is wrong, where, the value, and what to do. The entry points print it without a
    traceback and exit with code 2; every other exception is a defect of the program and keeps its traceback.
    """


def exit_code(work: Callable[[], int | None]) -> int:
    """Do an entry point's work. Its own exit code, 0 if it has none.

    2 after a user's mistake, which is printed; 128 and the signal's number after one that stops it (130 for Ctrl-C, 143
    for SIGTERM), with one line: what `work` says in its KeyboardInterrupt, or "interrupted".
    """
    with stopping.stoppable():
        try:
            return work() or 0
        except UserError as error:
            if not stopping.received():
                print(f"error: {error}", file=sys.stderr)
                return 2
            return _stopped("")
        except KeyboardInterrupt as stop:
            return _stopped(str(stop))
        except Exception:
            if stopping.received():  # what fails while all is taken down is the signal's consequence
                return _stopped("")
            raise


def _stopped(text: str) -> int:
    with suppress(OSError):  # a terminal that was closed
        print(text or "interrupted", file=sys.stderr, flush=True)
    return 128 + (stopping.received() or signal.SIGINT)


class ClusterError(RuntimeError):
    """An actor died or did not answer in time; the message names it and the call."""


class StaleGenerator(RuntimeError):
    """A generator was asked for completions of a version that it does not hold."""


class WeightTransferError(RuntimeError):
    """An update that did not arrive whole. The generator has no valid version and must not generate."""
