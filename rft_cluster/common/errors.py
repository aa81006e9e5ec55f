"""The one exception for a mistake that its user can mend, and what it means to an entry point."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or a cluster that cannot run what was asked.

    The message says what is wrong, where, the value, and what to do. The entry points print it without a
    traceback and exit with code 2; every other exception is a defect of the program and keeps its traceback.
    """


def exit_code(work: Callable[[], int | None]) -> int:
    """Do an entry point's work. Its own exit code, 0 if it has none; 2 after a user's mistake, which is printed."""
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class ClusterError(RuntimeError):
    """An actor died or did not answer in time; the message names it and the call."""


class StaleGenerator(RuntimeError):
    """A generator was asked for completions of a version that it does not hold."""


class WeightTransferError(RuntimeError):
    """An update that did not arrive whole. The generator has no valid version and must not generate."""
