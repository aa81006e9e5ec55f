"""The official archive of Oxford 102 Flowers (M-E. Nilsback and A. Zisserman, ICVGIP 2008) on disk.

    flowers/jpg/image_00001.jpg ... image_08189.jpg
    flowers/imagelabels.mat      `labels`: each image's class, 1 to 102
    flowers/setid.mat            `trnid`, `valid`, `tstid`: the official splits, image numbers from 1

Only the chosen images are decoded. Copies are still found among all images: equal files have equal sizes, so only
files that share their size with another file are read and hashed.
"""

import zlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import file_sha256
from rft_cluster.common.lookup import near_path
from rft_cluster.data.dataset import listing
from rft_cluster.data.reading import Labelled, Unread

CLASSES_FILE = Path(__file__).with_name("flowers102_classes.txt")
HOME = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
SPLITS = {"train": "trnid", "validation": "valid", "test": "tstid"}  # role -> variable of setid.mat


def flower_classes() -> list[str]:
    """The 102 names in the order of the archive's labels."""
    return CLASSES_FILE.read_text(encoding="utf-8").splitlines()


def open_archive(path: Path | None, key: str, max_bytes: int) -> Unread:
    """Check that an archive is complete, without decoding its images.

    `key` names the config key in the messages. At most `max_bytes` + 1 bytes of an image are read.

    Raises:
        UserError: a file is missing or is not a .mat file of the documented content, a label is not one of the 102
            classes, or the splits do not name every image exactly once.
    """
    root = _root(path, key)
    classes = flower_classes()
    labels = _numbers(root / "imagelabels.mat", "labels", key)
    wrong = [f"image {i}: label {label}" for i, label in enumerate(labels, 1) if not 1 <= label <= len(classes)]
    if wrong:
        raise UserError(
            f"{key}: imagelabels.mat in {root} has labels outside 1 to {len(classes)}; get it again from {HOME}:\n"
            f"{listing(wrong)}"
        )
    named = sorted(number for split in SPLITS.values() for number in _numbers(root / "setid.mat", split, key))
    if named != list(range(1, len(labels) + 1)):
        raise UserError(
            f"{key}: {' '.join(SPLITS.values())} of setid.mat in {root} do not name each of the {len(labels)} images "
            f"of imagelabels.mat once: they name {len(named)}, {len(set(named))} of them different. Get both again "
            f"from {HOME}"
        )
    ids = [_id(number) for number in range(1, len(labels) + 1)]
    _check_files(root, ids, key)
    examples = [Labelled(i, classes[label - 1]) for i, label in zip(ids, labels, strict=True)]
    return Unread(examples, _digests([root / i for i in ids]), partial(_read, root, max_bytes), f"{key} ({root})")


def open_splits(path: Path | None, key: str, max_bytes: int) -> dict[str, Unread]:
    """The official splits of an archive: 1,020 images for training, 1,020 for validation, 6,149 for the test.

    Raises:
        UserError: as in `open_archive`.
    """
    whole = open_archive(path, key, max_bytes)
    parts = {}
    for role, variable in SPLITS.items():
        ids = {_id(number) for number in _numbers(_root(path, key) / "setid.mat", variable, key)}
        parts[role] = replace(whole.where_id(ids.__contains__), where=f"{whole.where}, official split {variable}")
    return parts


def _id(number: int) -> str:
    return f"jpg/image_{number:05d}.jpg"


def _root(path: Path | None, key: str) -> Path:
    if path is None:
        raise UserError(
            f"{key} is missing: set it to the folder with the official Flower102 archive ({HOME}), or fetch that with "
            f"data.download=true"
        )
    root = path.absolute()
    if not root.is_dir():
        raise UserError(
            f"{key}: {root} {'is not a folder' if root.exists() else 'does not exist'}; it must hold jpg/, "
            f"imagelabels.mat and setid.mat from {HOME}{near_path(root)}"
        )
    return root


def _numbers(file: Path, name: str, key: str) -> list[int]:
    """The integers in variable `name` of a .mat file (Matlab 4 to 7.2). Nothing in the file is executed."""
    from scipy.io import loadmat  # takes a moment to import
    from scipy.io.matlab import MatReadError

    if not file.is_file():
        raise UserError(f"{key}: {file.parent} has no {file.name}; get it from {HOME}")
    try:
        values = loadmat(file, variable_names=(name,)).get(name)
    except (MatReadError, OSError, ValueError, TypeError, LookupError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{key}: {file} cannot be read ({error}); get it again from {HOME}") from error
    if values is None:
        raise UserError(f"{key}: {file} has no variable {name!r}; get it again from {HOME}")
    if not (isinstance(values, np.ndarray) and values.dtype.kind in "iuf" and np.array_equal(values, np.rint(values))):
        raise UserError(f"{key}: {name!r} in {file} must hold whole numbers; get it again from {HOME}")
    return [int(value) for value in values.ravel()]


def _check_files(root: Path, ids: list[str], key: str) -> None:
    inside = root.resolve()
    problems = []
    for example_id in ids:
        path = root / example_id
        if not path.is_file():  # also refuses a folder and a named pipe
            problems.append(f"{example_id}: missing")
        elif not path.resolve().is_relative_to(inside):
            problems.append(f"{example_id}: a link out of the folder")
    if problems:
        raise UserError(
            f"{key}: {len(problems)} of the {len(ids)} images that imagelabels.mat names cannot be used; unpack "
            f"102flowers.tgz from {HOME} into {root}:\n{listing(problems)}"
        )


def _read(root: Path, max_bytes: int, example_id: str) -> bytes:
    with (root / example_id).open("rb") as file:
        return file.read(max_bytes + 1)  # one more than `check_image` accepts: never all of a huge file


def _digests(files: list[Path]) -> list[str]:
    """One text a file, equal for byte-equal files: the size if no other file has the same, else a content hash."""
    sizes = [file.stat().st_size for file in files]
    count = Counter(sizes)
    return [
        f"{size}" if count[size] == 1 else f"{size} {file_sha256(file)}"
        for file, size in zip(files, sizes, strict=True)
    ]
