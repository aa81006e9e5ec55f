"""Images in folders: one sub-folder for each class, named as the class.

    photos/rose/a.jpg  photos/rose/b.png  photos/tulip/c.jpg  ...

or, where the test images are set apart:

    photos/train/rose/a.jpg  ...  photos/test/rose/b.jpg  ...

Only files directly in a class's folder count; hidden ones and those without a picture's suffix are left out.
"""

from dataclasses import dataclass
from pathlib import Path

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import FewShotDataset, check_classes, composed, listing
from rft_cluster.data.images import MAX_BYTES
from rft_cluster.data.split import (
    copies_of,
    few_shot_split,
    held_out_only,
    read_images,
    skip_or_refuse,
    training_only,
)
from rft_cluster.messages import Example

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pictures as well, which cannot be read here: named rather than passed over.
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".svg", ".jp2", ".psd", ".dng")


@dataclass(frozen=True)
class Photos:
    """The usable images of a folder of class folders."""

    classes: list[str]
    examples: list[Example]
    digests: list[str]
    skipped: dict[str, str]


def load_folder(config: DataSection, seed: int) -> FewShotDataset:
    """The data set in the folder `data.path`. Example ids are paths in it.

    Raises:
        UserError: the folder is missing or holds no classes, a class is empty or not in `data.classes`,
            images cannot be read (all are named, with the reason), or there are too few of them.
    """
    root = _root(config.path)
    folders = _folders(root, root)
    if not folders:
        raise UserError(f"data.path: {root} has no sub-folders; put each class's images in one named as the class")
    nested = [
        folder for folder in folders if not _image_files(folder) and any(map(_image_files, _folders(folder, root)))
    ]
    if [folder.name for folder in folders] == ["test", "train"] and len(nested) == 2:
        return _train_and_test(root, config, seed)
    if nested:
        raise UserError(_explain_nested(root, nested))
    photos = _photos(root, folders, config)
    classes = check_classes(photos.classes, config.classes)
    return few_shot_split(root.name, photos.examples, classes, config, seed, photos.digests, photos.skipped)


def _train_and_test(root: Path, config: DataSection, seed: int) -> FewShotDataset:
    """Training images and the pool from train/, validation and test images from test/."""
    photos, apart = (_photos(root, _folders(root / part, root), config) for part in ("train", "test"))
    classes = check_classes(photos.classes, config.classes)
    unknown = [repr(label) for label in apart.classes if label not in classes]
    if unknown:
        raise UserError(f"data.path: {root}/test has classes that {root}/train has not:\n{listing(unknown)}")
    known = copies_of(photos.examples, photos.digests, apart.examples, apart.digests)
    kept = [i for i, example in enumerate(apart.examples) if example.example_id not in known]
    chosen = few_shot_split(
        root.name, photos.examples, classes, training_only(config), seed, photos.digests, photos.skipped
    )
    examples, digests = [apart.examples[i] for i in kept], [apart.digests[i] for i in kept]
    held_out = few_shot_split(root.name, examples, classes, held_out_only(config), seed, digests, apart.skipped)
    return chosen.with_held_out(held_out, known)


def _explain_nested(root: Path, nested: list[Path]) -> str:
    names = ", ".join(f"{folder.name}/" for folder in nested)
    if len(nested) == 1 and len(_folders(root, root)) == 1:
        return f"data.path: {root} holds the one folder {names}, and the classes lie in it: set data.path={nested[0]}"
    return (
        f"data.path: {root} must hold a folder of images for each class, but {names} hold folders of images. Set "
        f"data.path to the one that holds the classes, or keep exactly train/ and test/ there, each with its classes"
    )


def _photos(root: Path, folders: list[Path], config: DataSection) -> Photos:
    """The images in the class folders. Labels are composed (NFC): some file systems give accents apart."""
    labels = [composed(folder.name) for folder in folders]
    check_classes(labels, None)  # before a dictionary could merge two of them
    files = {label: _image_files(folder) for label, folder in zip(labels, folders, strict=True)}
    empty = [f"{folder.relative_to(root)}/" for label, folder in zip(labels, folders, strict=True) if not files[label]]
    if empty:
        raise UserError(
            f"these class folders in data.path ({root}) hold no image files ({' '.join(SUFFIXES)}); add "
            f"images or remove them:\n{listing(empty)}"
        )
    unread = [Example(str(path.relative_to(root)), b"", label) for label, paths in files.items() for path in paths]
    examples, digests, bad = read_images(unread, lambda example_id: _read(root / example_id, root))
    skip_or_refuse(bad, f"{len(examples)} image files in data.path ({root})", config)
    return Photos(labels, examples, digests, bad)


def _root(path: Path | None) -> Path:
    if path is None:
        raise UserError("data.path is missing: data.source is folder, so set it to the folder with your images")
    root = path.expanduser().absolute()
    if not root.exists():
        raise UserError(f"data.path: {root} does not exist")
    if not root.is_dir():
        raise UserError(f"data.path: {root} is not a folder; it must hold a sub-folder of images for each class")
    return root


def _folders(folder: Path, root: Path) -> list[Path]:
    folders = [path for path in _entries(folder) if path.is_dir()]
    for path in folders:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"data.path: {path} is a link out of {root}; put the images themselves there")
    return folders


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES + OTHER_SUFFIXES]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"data.path: {folder} cannot be read: {error.strerror}") from error


def _read(path: Path, root: Path) -> bytes:
    where = path.relative_to(root)
    try:
        str(where).encode()
        resolved = path.resolve()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: its name is not UTF-8; rename it") from error
    except RuntimeError as error:  # what Python 3.11 and 3.12 say of a link to itself
        raise UserError(f"{where}: a link to itself") from error
    if not resolved.is_relative_to(root.resolve()):
        raise UserError(f"{where}: a link out of the folder")
    if path.is_dir():
        raise UserError(f"{where}: a folder, not a file")
    if not path.is_file():  # opening a named pipe would wait for ever
        raise UserError(f"{where}: not a file, or a link to nothing")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)  # one more than `check_image` accepts: never all of a huge file
