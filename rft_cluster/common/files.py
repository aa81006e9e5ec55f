"""Files that are there whole or not at all: written under another name, then renamed."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rft_cluster.common.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

FORMAT = 2
"""Of the records that a run leaves. Those without a number are of format 1, and are read; newer ones are refused."""


class NewerFormat(UserError):
    """A record that a newer version of the program wrote: nothing is wrong with it."""


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object that a text is, or None: a record that was cut, or damaged in another way."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON or not UTF-8, or nested without end
        return None
    return value if isinstance(value, dict) else None


def check_format(values: dict[str, Any], file: str | Path) -> None:
    """Take the format's number out of a record.

    Raises:
        NewerFormat: a newer version wrote it.
        UserError: it has no such number.
    """
    found = str(values.pop("format", 1))
    if not found.isdecimal() or len(found) > 9:
        raise UserError(f"{file} is damaged: format {found[:20]!r} is no number of a format")
    if int(found) > FORMAT:
        raise NewerFormat(
            f"{file} was written by a newer version of rft_cluster: format {found}, this one reads up to {FORMAT}"
        )


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write, then rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            temporary.unlink(missing_ok=True)  # a link of that name in somebody else's folder would be followed
            temporary.write_text(text, encoding="utf-8")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system in here says which path it is of: that of a write, on a full disk for one, does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, which gets that name when all that was to be written in here is.

    Where that fails nothing is left: what half a checkpoint takes may be what fills the disk.

    Raises:
        UserError: the disk is full.
    """
    folder = final.with_name(final.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        publish(folder, final)
    except BaseException as error:
        written = bytes_in(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(
                f"{final} cannot be written: {error.strerror}. It needs more than {size(written)}; "
                f"{size(shutil.disk_usage(final.parent).free)} are free there without it. Free some space, lower "
                f"schedule.keep_checkpoints, or set run.folder to another disk"
            ) from error
        raise


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, in place of an older one of that name."""
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def recover(final: Path) -> None:
    """Undo what a crash in `unfinished` left; `final` itself is as it was before, or whole."""
    old = final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
        old.rename(final)
    for left in (old, final.with_name(final.name + ".tmp")):
        shutil.rmtree(left, ignore_errors=True)


def check_writable(folder: Path, cure: str) -> None:
    """Refuse a folder in which nothing can be written; while it is not there, the nearest one above it. A file without
    a name is tried there: nothing is left. `cure`: what to do, e.g. which key to change.

    Raises:
        UserError: says why not.
    """
    path = folder.absolute()
    nearest = next(there for there in (path, *path.parents) if os.path.lexists(there))
    try:
        longest = os.pathconf(nearest if nearest.is_dir() else "/", "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        where = "" if nearest == path else f" (in {nearest})"
        reason = "it is a link to nothing" if nearest.is_symlink() and not nearest.exists() else error.strerror
        raise UserError(f"{folder} cannot be written{where}: {reason}. {cure}") from error


def check_home() -> None:
    """Raises UserError where this user has no home folder, as a container's that runs under a number without a name."""
    if not os.path.isabs(os.path.expanduser("~")):
        raise UserError("this user has no home folder, where caches and Ray's token are kept: export HOME=FOLDER")


def check_space(folder: Path, needed: int, what: str, cure: str) -> None:
    """Refuse a folder on whose disk fewer than `needed` bytes are free.

    Raises:
        UserError: says `what` they are for, how many there are and what to do.
    """
    path = folder.absolute()
    nearest = next(there for there in (path, *path.parents) if there.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise UserError(f"{what} need {size(needed)} in {folder}, but {size(free)} are free there. {cure}")


def size(count: int) -> str:
    """A number of bytes for people: 28 MB, 4.4 GB."""
    return f"{count / 10**9:.1f} GB" if count >= 10**9 else f"{max(count, 0) / 10**6:.0f} MB"


def bytes_in(folder: Path) -> int:
    """What the files in a folder and below take, links not followed; 0 where there is none."""
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)
