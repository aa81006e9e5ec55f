"""The official Flower102 archive, fetched from its home once and kept in a cache.

    ~/.cache/rft_cluster/flowers102/    jpg/, imagelabels.mat, setid.mat: what `archive.open_archive` reads

Addresses, MD5s and the order of the class names are those of torchvision's `Flowers102`. The folder gets its name only
when every file has its MD5 and every image is there, so half a download is never taken for the archive.
"""

import fcntl
import gzip
import hashlib
import re
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

from rft_cluster.common.errors import Unavailable, UserError, is_passing
from rft_cluster.common.files import check_space, check_writable, size, unfinished
from rft_cluster.common.labels import normalise_label
from rft_cluster.common.progress import with_progress
from rft_cluster.data.archive import flower_classes, open_archive
from rft_cluster.data.dataset import listing
from rft_cluster.data.images import MAX_BYTES

CACHE = Path("~/.cache/rft_cluster/flowers102")
ELSEWHERE = "Set HOME to another folder"  # where the cache is
PICTURE = re.compile(r"jpg/image_\d{5}\.jpg")
PIECE = 10**6  # bytes
PATIENCE = 30.0  # seconds without a byte before the server counts as down
BY_HAND = (
    "elsewhere download 102flowers.tgz, imagelabels.mat and setid.mat, unpack the first beside the others, and set "
    "data.path (data.held_out with a data set of the hub) to that folder"
)
DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


class Source(NamedTuple):
    """Where the archive is from. `md5s`: by file name; the first file is the packed pictures."""

    home: str
    md5s: dict[str, str]


def is_cached() -> bool:
    return CACHE.expanduser().is_dir()


def size_to_download() -> str:
    """`bytes_to_download`, for people."""
    total = bytes_to_download()
    return size(total) if total else "files of unknown size"


def bytes_to_download() -> int:
    """The size of the archive's files if they are not in the cache yet; 0 if they are, or if the server does not say.
    Nothing is fetched.

    Raises:
        UserError: as `official_archive`, except for what only the files themselves show.
    """
    final = CACHE.expanduser()
    if is_cached():
        return 0
    source = _source()
    check_writable(final, ELSEWHERE)
    total = 0
    for name in source.md5s:
        with _answers(source.home + name, "HEAD") as answer:
            total += _length(answer)
    check_space(final, 2 * total, "data.download: the official archive, packed and unpacked", f"Free some. {ELSEWHERE}")
    return total


def official_archive() -> Path:
    """The folder with the archive. If it is not in the cache, it is fetched, with a progress line.

    Raises:
        Unavailable: the server cannot be reached.
        UserError: the server refuses or gives other files than torchvision knows, the cache cannot be
            written or has no room, or torchvision's class names are not ours. The message says what to do.
    """
    final = CACHE.expanduser()
    if is_cached():
        return final
    print(f"downloading the official Flower102 archive, {size_to_download()}, to {final}", flush=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _alone(final.with_name(final.name + ".lock")):
        if not is_cached():  # another process may have fetched it meanwhile
            with unfinished(final, f"Free some. {ELSEWHERE}") as folder:
                _fetch(_source(), folder)
    return final


def _source() -> Source:
    from torchvision.datasets import Flowers102  # takes seconds to import

    _check_names(list(Flowers102.classes))
    files = [Flowers102._file_dict[part] for part in ("image", "label", "setid")]
    return Source(Flowers102._download_url_prefix, dict(files))


def _check_names(theirs: list[str]) -> None:
    """Raise UserError if torchvision and this program name the archive's labels differently."""
    pairs = enumerate(zip_longest(flower_classes(), theirs, fillvalue=""), 1)
    lines = [f"label {n}: {a!r} here, {b!r} there" for n, (a, b) in pairs if normalise_label(a) != normalise_label(b)]
    if lines:
        raise UserError(
            f"data.download: the classes of Flower102 have other names here than in torchvision "
            f"{version('torchvision')}, so answers could be judged by wrong ones; install the version in "
            f"pyproject.toml:\n{listing(lines)}"
        )


def _fetch(source: Source, folder: Path) -> None:
    for name, md5 in source.md5s.items():
        digest = hashlib.md5(usedforsecurity=False)
        with (folder / name).open("wb") as file:
            for piece in _pieces(source.home + name):
                file.write(piece)
                digest.update(piece)
        if digest.hexdigest() != md5:
            raise UserError(
                f"data.download: {source.home}{name} was cut or changed on its way: its MD5 is {digest.hexdigest()}, "
                f"not {md5}: start again, or {BY_HAND}"
            )
    packed = folder / next(iter(source.md5s))
    _unpack(packed, folder)
    packed.unlink()
    open_archive(folder, f"data.download: {source.home}", MAX_BYTES)


def _unpack(packed: Path, folder: Path) -> None:
    """Unpack the pictures, and nothing else that may be in the file.

    Each is read and written here: the Python of Debian 12 (3.11.2) has no filter for unsafe members in `tarfile` yet.
    """
    try:
        with tarfile.open(packed, "r:gz") as tar:
            for member in tar:
                if PICTURE.fullmatch(member.name) and member.isfile() and (content := tar.extractfile(member)):
                    picture = folder / member.name
                    picture.parent.mkdir(exist_ok=True)
                    picture.write_bytes(content.read())
    except DAMAGED as error:
        raise UserError(f"data.download: {packed.name} cannot be unpacked ({error}): start again") from error


def _pieces(url: str) -> Iterator[bytes]:
    """The content, in pieces of `PIECE` bytes, while a line tells how far the download is."""
    with _answers(url, "GET") as answer:
        length, read = _length(answer), 0
        for _ in with_progress(range(-(-length // PIECE)), f"downloading {url.rpartition('/')[2]}, MB"):
            piece = answer.read(PIECE)
            read += len(piece)
            yield piece
        if read < length:
            raise ConnectionError(f"it ended after {read} of {length} bytes")
        while piece := answer.read(PIECE):  # of unknown length, as a proxy may pass it on
            yield piece


def _length(answer: HTTPResponse) -> int:
    """In bytes; 0 if the server does not say."""
    return int(answer.headers.get("Content-Length", 0))


@contextmanager
def _answers(url: str, method: str) -> Iterator[HTTPResponse]:
    """The server's answer. Errors, here and while the answer is read, become one of these with the cure.

    Raises:
        Unavailable: the server cannot be reached, is too busy, or hangs up.
        UserError: the server refuses.
    """
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "rft_cluster"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            yield answer
    except (OSError, HTTPException) as error:  # OSError: also a refused, cut or silent connection, and an HTTP status
        refused = isinstance(error, HTTPError) and not is_passing(error.code)
        raise (UserError if refused else Unavailable)(
            f"data.download: {url} cannot be fetched ({error}), and the archive is not in {CACHE}: {BY_HAND}"
        ) from error


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold the kernel's lock on a file: of several processes that start at once, one fetches and the others wait."""
    with file.open("w") as lock:
        with suppress(OSError):  # a file system without locks, as of some clusters' home folders
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
