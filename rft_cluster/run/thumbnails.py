"""`thumbnails.zip` in a run's folder: a small copy of each image, so that a run can be looked at without its data."""

import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread

from rft_cluster.common.files import write_bytes
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.images import DECODE_ERRORS
from rft_cluster.data.thumbnails import thumbnail
from rft_cluster.run.resume import is_run

FILE = "thumbnails.zip"
MOST_BYTES = 12 * 10**6  # some 5,000 photographs
LARGEST = 100_000  # bytes of one: a thumbnail of 96 pixels has 28 kB before it is compressed
NAME = re.compile(r"([0-9a-f]{64})\.webp")
# What `zipfile` raises for an archive that is cut, damaged or encrypted.
DAMAGED = (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError)


def keep_thumbnails(run: Path, dataset: FewShotDataset) -> None:
    """Write the thumbnails of a data set, unless they are there, beside the caller's work: a millisecond an image.

    A launch that failed may have left those of other data in a folder that is no run yet.
    """
    if not (run / FILE).exists() or not is_run(run):
        Thread(target=_write, args=(run / FILE, dataset), name="thumbnails", daemon=True).start()


def _write(file: Path, dataset: FewShotDataset) -> None:
    with suppress(OSError):  # a full disk, or a folder that is gone: the run has said so, or needs no pictures
        write_bytes(file, archive(thumbnails(wanted(dataset), dataset.images)))


def wanted(dataset: FewShotDataset) -> list[str]:
    """The SHA-256 of a data set's images, those first that are shown most."""
    return [example.image.sha256 for split in ("train", "test", "validation") for example in dataset.splits[split]]


def thumbnails(wanted: Iterable[str], images: Mapping[str, bytes]) -> dict[str, bytes]:
    """Thumbnails by SHA-256, in that order, as many as `MOST_BYTES` hold; none of an image that cannot be decoded."""
    found: dict[str, bytes] = {}
    room = MOST_BYTES
    for sha256 in wanted:
        if room <= 0:
            break
        with suppress(KeyError, *DECODE_ERRORS):
            found[sha256] = thumbnail(images[sha256])
            room -= len(found[sha256])
    return found


def read_thumbnails(run: Path) -> dict[str, bytes]:
    """The thumbnails in a run's folder, WebP by SHA-256; empty if there are none. The file may be a stranger's."""
    file = run / FILE
    if file.is_symlink() or not file.is_file():
        return {}
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [(NAME.fullmatch(entry.filename), entry) for entry in archive.infolist()]
            fits = [(name[1], entry) for name, entry in entries if name and _fits(entry)]
            return {sha256: archive.read(entry) for sha256, entry in fits[: MOST_BYTES // 100]}
    except DAMAGED:
        return {}


def _fits(entry: zipfile.ZipInfo) -> bool:
    """Not compressed, as `archive` writes: each kind of compression has errors of its own."""
    return entry.compress_type == zipfile.ZIP_STORED and entry.file_size <= LARGEST


def archive(found: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # WebP is compressed
        for sha256, content in found.items():
            archive.writestr(zipfile.ZipInfo(f"{sha256}.webp"), content)
    return file.getvalue()
