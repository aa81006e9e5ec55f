"""Images in folders: one sub-folder for each class, named as the class.

    photos/rose/a.jpg  photos/rose/b.png  photos/tulip/c.jpg  ...

Only files directly in a class's folder count; hidden ones and those without an image's suffix are left out.
"""

import unicodedata
from pathlib import Path

from rft_cluster.config import DataSection
from rft_cluster.data.dataset import FewShotDataset, check_classes, few_shot_split, listing
from rft_cluster.data.images import MAX_BYTES, check_image
from rft_cluster.errors import UserError
from rft_cluster.messages import Example

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_folder(config: DataSection, seed: int) -> FewShotDataset:
    """The data set in the folder `data.path`. Example ids are paths in it.

    Raises:
        UserError: the folder is missing or holds no classes, a class is empty or not in `data.classes`,
            images cannot be read (all are named, with the reason), or there are too few of them.
    """
    root = _root(config.path)
    folders = _class_folders(root)
    classes = check_classes(list(folders), config.classes)
    files = {label: _image_files(folder) for label, folder in folders.items()}
    empty = [f"{folder.name}/" for label, folder in folders.items() if not files[label]]
    if empty:
        raise UserError(
            f"these class folders in data.path ({root}) hold no image files ({' '.join(SUFFIXES)}); add "
            f"images or remove them:\n{listing(empty)}"
        )

    examples, digests, problems = [], [], []
    for label, paths in files.items():
        for path in paths:
            example_id = str(path.relative_to(root))
            try:
                data = _read(path, root)
                digests.append(check_image(data, example_id))
            except OSError as error:
                problems.append(f"{example_id}: {error.strerror}")
            except UserError as error:
                problems.append(str(error))
            else:
                examples.append(Example(example_id, data, label))
    if problems:
        raise UserError(
            f"{len(problems)} of the {len(problems) + len(examples)} image files in data.path ({root}) "
            f"cannot be used; mend or remove them:\n{listing(problems)}"
        )
    return few_shot_split(root.name, examples, classes, config, seed, digests)


def _root(path: Path | None) -> Path:
    if path is None:
        raise UserError("data.path is missing: data.source is folder, so set it to the folder with your images")
    root = path.expanduser().absolute()
    if not root.exists():
        raise UserError(f"data.path: {root} does not exist")
    if not root.is_dir():
        raise UserError(f"data.path: {root} is not a folder; it must hold a sub-folder of images for each class")
    return root


def _class_folders(root: Path) -> dict[str, Path]:
    """Folders by label. Labels are composed (NFC): some file systems give accents as separate characters."""
    folders = [path for path in _entries(root) if path.is_dir()]
    if not folders:
        raise UserError(f"data.path: {root} has no sub-folders; put each class's images in one named as the class")
    for folder in folders:
        if not folder.resolve().is_relative_to(root.resolve()):
            raise UserError(f"data.path: {folder} is a link out of {root}; put the images themselves there")
    labels = [unicodedata.normalize("NFC", folder.name) for folder in folders]
    check_classes(labels, None)  # before the dictionary below could merge two of them
    return dict(zip(labels, folders, strict=True))


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES and not path.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"data.path: {folder} cannot be read: {error.strerror}") from error


def _read(path: Path, root: Path) -> bytes:
    where = path.relative_to(root)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: a link out of the folder")
    if not path.is_file():  # opening a named pipe would wait for ever
        raise UserError(f"{where}: not a file, or a link to nothing")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)  # one more than `check_image` accepts: never all of a huge file
