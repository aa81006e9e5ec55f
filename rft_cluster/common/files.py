"""Write files and folders atomically: under another name first, then renamed. Also checks of disk and folders."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rft_cluster.common.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = "Free some space, lower schedule.keep_checkpoints, or set run.folder to another disk"

FORMAT = 2
"""Of the records that a run leaves. Those without a number are of format 1, and are read; newer ones are refused."""


class NewerFormat(UserError):
    """A newer version of the program wrote this record; the record itself is not damaged."""


class DiskFull(UserError):
    """There is no room for what is to be written. Nothing of it is left, and older files are untouched."""


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None if the text is cut or damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deep
        return None
    return value if isinstance(value, dict) else None


def check_format(values: dict[str, Any], file: str | Path) -> None:
    """Remove the format number from a record and check it.

    Raises:
        NewerFormat: a newer version wrote the record.
        UserError: the number is missing.
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
    """Write a file, then rename it: a reader sees the old file or the complete new one."""
    _write(path, text.encode(), synced=False)


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, and the content is on the disk before the rename: it survives a power cut."""
    _write(path, content, synced=True)


def _write(path: Path, content: bytes, synced: bool) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            temporary.unlink(missing_ok=True)  # do not follow a link of that name
            temporary.write_bytes(content)
            if synced:
                sync(temporary)
    except BaseException:  # a signal, too
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


SEAL = "sha256"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Add to a record the SHA-256 of its other values, so that a changed bit in it is found; see `check_seal`."""
    return {**values, SEAL: _digest_of(values)}


def check_seal(values: dict[str, Any]) -> bool:
    """Remove the seal from a record and compare it. Records of older versions have none, and pass."""
    seal = values.pop(SEAL, None)
    return seal is None or seal == _digest_of(values)


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it; about 1.5 GB/s."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk: a rename alone does not survive a power cut."""
    with naming(path):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to every OSError raised in this context: errors of a write, as on a full disk, lack it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def unfinished(final: Path, cure: str = ROOM) -> Iterator[Path]:
    """Yield an empty folder to write to. At the end of the context its files are on the disk, and it becomes `final`.

    After an error it is removed: half a checkpoint may be what fills the disk. `cure`: advice for the message then.

    Raises:
        DiskFull: the disk is full.
    """
    folder = final.with_name(final.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
            sync(path)
        publish(folder, final)
        sync(final.parent)
    except BaseException as error:
        written = bytes_in(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFull(
                f"{final} cannot be written: {error.strerror}. It needs more than {size(written)}; "
                f"{size(_free(final.parent))} are free there without it. {cure}"
            ) from error
        raise


@contextmanager
def made_once(final: Path) -> Iterator[Path]:
    """Yield an empty folder that no other process has. At the end of the context it becomes `final`, unless another
    process was first. After an error it is removed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    try:
        yield folder
        folder.chmod(0o755)
        try:
            folder.rename(final)
        except OSError:
            if not final.exists():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder to `final`, replacing an older one."""
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def recover(final: Path) -> None:
    """Clean up after a crash in `unfinished`. Afterwards `final` is the old folder or the complete new one."""
    old = final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
        old.rename(final)
    for left in (old, final.with_name(final.name + ".tmp")):
        shutil.rmtree(left, ignore_errors=True)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, but raises OSError for a folder that cannot be read: its files would be missing without a word."""

    def fail(error: OSError) -> None:
        raise error

    return ((Path(path), folders, names) for path, folders, names in os.walk(folder, onerror=fail))


def check_writable(folder: Path, cure: str) -> None:
    """Check that files can be written in a folder, or in its nearest existing parent.

    A file without a name is created there, so nothing is left. `cure`: advice for the message.

    Raises:
        UserError: the folder is not writable; the message says why.
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
    """Raise UserError if the user has no home folder, as in a container that runs under an unnamed user id."""
    if not os.path.isabs(os.path.expanduser("~")):
        raise UserError("this user has no home folder, where caches and Ray's token are kept: export HOME=FOLDER")


def check_space(folder: Path, needed: int, what: str, cure: str) -> None:
    """Check that `needed` bytes are free on a folder's disk.

    Raises:
        DiskFull: fewer are free; the message says `what` needs them and the advice in `cure`.
    """
    free = _free(folder)
    if needed > free:
        raise DiskFull(f"{what} need {size(needed)} in {folder}, but {size(free)} are free there. {cure}")


def _free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, or of its nearest existing parent."""
    path = folder.absolute()
    return shutil.disk_usage(next(there for there in (path, *path.parents) if there.exists())).free


def size(count: int) -> str:
    """A number of bytes for people: 28 MB, 4.4 GB."""
    return f"{count / 10**9:.1f} GB" if count >= 10**9 else f"{max(count, 0) / 10**6:.0f} MB"


def bytes_in(folder: Path) -> int:
    """Total size in bytes of the files in a folder and below, without following links; 0 if there is no folder."""
    total = 0
    for file in (Path(root, name) for root, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):  # removed meanwhile, by an actor that wrote it
            total += file.lstat().st_size
    return total
