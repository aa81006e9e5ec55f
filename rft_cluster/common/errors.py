"""Exceptions that a user can fix, and the exit codes of commands."""

import atexit
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import NoReturn, TextIO

from rft_cluster.common import stopping
from rft_cluster.common.text import shown_lines

# Errors of the operating system that the user can fix, with advice. All other exceptions are defects of the program.
FIXABLE = {
    errno.ENOSPC: "the disk is full: free some space there, or choose another folder",
    errno.EDQUOT: "your quota of disk space is used up: free some space there, or choose another folder",
    errno.EFBIG: "a file may not grow so large there: raise the limit (ulimit -f), or choose another folder",
    errno.EROFS: "it is mounted read-only: choose another folder",
    errno.EACCES: "it may not be read or written by you: change its permissions, or choose another folder",
    errno.EPERM: "the system does not permit it: change its owner or permissions, or choose another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system: shorten it",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "it is a folder, not a file: choose another path",
    errno.ENOENT: "it is not there, or was removed meanwhile",
    errno.ELOOP: "its links lead round in a circle: remove one of them",
    errno.EIO: "the device reports a fault: look at the system's log, or choose another folder",
    errno.ESTALE: "the network file system has lost it: mount it again",
    errno.EMFILE: "too many files are open: raise the limit, e.g. ulimit -n 65536",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.ENOMEM: "the machine has no memory left: end other programs, or ask for less",
    errno.EAGAIN: "the system grants no more processes or memory: raise the limit (ulimit -u), or end other programs",
    errno.ECONNREFUSED: "nothing answers there: check the address and whether the service runs",
    errno.ECONNRESET: "the connection was cut: check the network",
    errno.EHOSTUNREACH: "the host cannot be reached: check the address and the network",
    errno.ENETUNREACH: "the network cannot be reached: check the connection",
    errno.ETIMEDOUT: "no answer came in time: check the address and the network",
}
# Of these, what passes without anybody's doing: the network, or the server of a network disk.
PASSING = {errno.EIO, errno.ESTALE, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT}
# Exit code for ClusterError, Unavailable and `PASSING`: nothing to correct, so a scheduler may start the command again.
PART_LOST = 3
PIPE_CLOSED = 141  # a shell's exit code for SIGPIPE: 128 + 13


class UserError(Exception):
    """Bad input, or a cluster that cannot run the configuration.

    The message says what is wrong, where, the value, and what to do. Commands print it without a traceback and exit
    with code 2. They do the same for the errors in `FIXABLE`. The code is 3 for `ClusterError`, `Unavailable` and the
    errors in `PASSING`. Any other exception is a defect of the program and keeps its traceback.
    """


class NoRoom(UserError):
    """The nodes of a cluster cannot hold the run."""


class Unavailable(UserError):
    """A server does not answer now, such as the hub's. With the same input the command may succeed later."""


class Taken(NoRoom, Unavailable):
    """Others hold the resources of a cluster now, perhaps those that a run gave back between two of its parts."""


def is_passing(status: int) -> bool:
    """Whether a server that answers with this HTTP status may soon answer otherwise: it is too busy, or broken."""
    return status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def check_range(option: str, value: int, least: int, most: int) -> None:
    """Raise UserError if a number on the command line is out of its range."""
    if not least <= value <= most:
        raise UserError(f"{option} is {value}: it must be between {least} and {most}")


class ClusterError(RuntimeError):
    """Something of the cluster was lost: an actor died or did not answer in time. The message names it and the call.

    `lost`: the names of these actors, as far as they are known.
    """

    def __init__(self, message: str, lost: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.lost = frozenset(lost)


class RepeatedUpdate(RuntimeError):
    """A learner was asked for the updates of a step that its weights already have. No update is made twice."""


class EngineFailed(ClusterError):
    """A generator's engine failed in a step, or a worker process of it died. It cannot be used any more."""


class WeightTransferError(ClusterError):
    """A weight update failed or did not verify. The generator has no valid version and must not generate."""


class StaleGenerator(WeightTransferError):
    """A generator was asked for a newer version of the weights than it has, or than it had when it wrote a token."""


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command, and end the process with its exit code, like `sys.exit(main())`, but right after the `atexit`
    handlers.

    Libraries are not torn down. Threads of Ray's core have crashed in that, after a run that was done. The exit code
    was then that of the crash (SIGSEGV, -11 or 139), for which a scheduler starts the run again. Handlers that were
    registered before this call are left out: those are of Python's own modules, and have nothing to do.
    """
    code = 1  # of an exception, whose traceback the interpreter prints before it calls the handlers

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # handlers that are registered later are called earlier
    try:
        code = main()
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        raise
    sys.exit(code)


def exit_code(work: Callable[[], int | None]) -> int:
    """Run a command's `work` and return the exit code: the one that `work` returns, 0 for None.

    Errors that the user can fix are printed and give 2; the loss of an actor, and a server that does not answer, give
    3. A signal gives 128 + its number (130 for Ctrl-C, 143 for SIGTERM) and prints one line: the text of the
    KeyboardInterrupt from `work`, or "interrupted". A closed output (`predict ... | head`) ends the command silently,
    as for Unix tools.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character gets its code
    with stopping.stoppable():
        try:
            return _code(work)
        except KeyboardInterrupt as stop:
            return _stopped(str(stop))
        except Exception:
            if stopping.received():  # errors during the shutdown are consequences of the signal
                return _stopped("")
            raise


def _code(work: Callable[[], int | None]) -> int:
    try:
        code = work() or 0
        if sys.stdout:
            sys.stdout.flush()  # an error can be reported here, but not at the interpreter's exit
        return code
    except (UserError, ClusterError) as error:
        if stopping.received():
            raise
        print(f"error: {shown_lines(str(error))}", file=sys.stderr)
        return PART_LOST if isinstance(error, ClusterError | Unavailable) else 2
    except OSError as error:
        cut = _silence_cut_streams()
        if isinstance(error, BrokenPipeError) and cut:
            return PIPE_CLOSED
        if error.errno not in FIXABLE or stopping.received():
            raise
        print(f"error: {shown_lines(explain(error))}", file=sys.stderr)
        return PART_LOST if error.errno in PASSING else 2


def _stopped(text: str) -> int:
    with suppress(OSError):  # a terminal that was closed
        print(text or "interrupted", file=sys.stderr, flush=True)
    return 128 + (stopping.received() or signal.SIGINT)


def described(error: Exception) -> str:
    """The message for an error in a line of its own."""
    return explain(error) if isinstance(error, OSError) and error.errno in FIXABLE else str(error)


def explain(error: OSError) -> str:
    """The message for an error in `FIXABLE`: what, where, and what to do."""
    assert error.errno is not None
    where, reason = error.filename or "the output or a file", error.strerror or os.strerror(error.errno)
    return f"{where}: {reason}: {FIXABLE[error.errno]}"


def _silence_cut_streams() -> bool:
    """Return True if stdout or stderr cannot be written any more (reader gone, disk full).

    Buffered output is dropped, since the interpreter would fail to flush it at its exit.
    """
    cut = [number for number, stream in ((1, sys.stdout), (2, sys.stderr)) if stream and _is_cut(number, stream)]
    for number in cut:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(cut)


def _is_cut(number: int, stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(number, 0)  # poll always reports errors and a closed pipe
    try:
        stream.flush()
    except OSError:
        return True
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
