"""Lock a run folder for the process that writes to it. The lock ends with the process, however it ends.

`runs/NAME/.lock` names the holder, for the message to a second process, and is removed at the end. The lock is the
kernel's (flock), which NFS passes on to its server. That keeps a lock for `LEASE` after its machine is gone, so a lock
of another machine is waited for as long. On a file system without locks the file's content decides.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import check_writable, json_object
from rft_cluster.common.text import shown

LOCK_FILE = ".lock"
MOMENT = 0.1  # seconds; `holder` has the lock for far less
LEASE = 120.0  # seconds; NFS 4's own is 90 (nfsd of Linux: /proc/fs/nfsd/nfsv4leasetime)


class Owner(BaseModel):
    pid: int
    host: str
    since: str

    @property
    def elsewhere(self) -> bool:
        """On another machine."""
        return self.host != socket.gethostname()


class Held(UserError):
    """Another process holds the lock."""

    def __init__(self, message: str, elsewhere: bool) -> None:
        """`elsewhere`: on another machine."""
        super().__init__(message)
        self.elsewhere = elsewhere


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. The folder is created if missing, and removed again if it stays empty.

    Raises:
        Held: another process holds it; on another machine, still after `LEASE`.
        UserError: the folder is not writable.
    """
    check_writable(folder, "Set run.folder to a folder that can be")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(folder / LOCK_FILE)
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # the folder is not empty
            for path in made:
                path.rmdir()


def holder(folder: Path) -> str | None:
    """A message about the process that holds a run folder; None if none does. Takes a shared lock for a
    moment, which `locked` sits out."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        _lock(descriptor, folder / LOCK_FILE, fcntl.LOCK_SH)
    except UserError as error:
        return str(error)
    except OSError:  # a folder or a pipe
        return None
    finally:
        os.close(descriptor)
    return None


def _acquire(file: Path) -> int:
    """Take the lock; wait for one of another machine. Returns the open file."""
    end, asked = None, False
    while True:
        try:
            return _take(file)
        except Held as held:
            if not held.elsewhere:
                if asked:
                    raise
                asked = True  # it may be somebody's `holder`, on a file that a killed process left
                time.sleep(MOMENT)
                continue
            if end is None:
                end = time.monotonic() + LEASE
                why = "a network disk keeps the lock of a machine that is gone"
                print(f"{held}\nwaiting {LEASE:g} s at most: {why}", flush=True)
            elif time.monotonic() >= end:
                raise
        time.sleep(1)


def _take(file: Path) -> int:
    """Take the lock at once, and write who has it. Returns the open file."""
    while True:
        # Do not follow a link: in a stranger's folder it may lead to any file, and the file is truncated below.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(descriptor, file, fcntl.LOCK_EX)
            if _is_at(descriptor, file):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    owner = Owner(pid=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S"))
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, owner.model_dump_json().encode(), 0)
    return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    """Return True if the open file is still the one at that path.

    The last holder may have removed it in between. The next process would then create and lock a new one.
    """
    try:
        return os.fstat(descriptor).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _lock(descriptor: int, file: Path, kind: int) -> None:
    owner = _owner(descriptor)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Held(_held(file, owner), elsewhere=owner is not None and owner.elsewhere) from error
    except OSError as error:  # a file system without locks
        if owner and (owner.elsewhere or psutil.pid_exists(owner.pid)):
            raise UserError(_held(file, owner)) from error


def _owner(descriptor: int) -> Owner | None:
    """The holder that the file names; None if it has not written its name yet."""
    try:
        return Owner.model_validate(json_object(os.pread(descriptor, 4096, 0)))
    except ValidationError:
        return None


def _held(file: Path, owner: Owner | None) -> str:
    who, cure = "", ""
    if owner:
        who = f" (pid {owner.pid} on {shown(owner.host)} since {shown(owner.since)})"
        if owner.elsewhere:
            cure = f"; if {shown(owner.host)} is gone, remove {file}"
    return (
        f"{file.parent}: another process is running it{who}. Wait for it or stop it, or choose another run.name{cure}"
    )
