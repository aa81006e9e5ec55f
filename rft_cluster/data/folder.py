"""Images in folders: one sub-folder for each class, named as the class.

    photos/rose/a.jpg  photos/rose/b.png  photos/tulip/c.jpg  ...

or with splits (in any of the usual words: Training, valid, Test_Images):

    photos/train/rose/a.jpg  ...  photos/val/rose/b.jpg  ...  photos/test/rose/c.jpg  ...

One more level is accepted where the meaning is clear: photos/photos/rose/a.jpg, as archives unpack into a folder of
their own name, and photos/rose/images/a.jpg. Files that are not read are counted by kind.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import near_path
from rft_cluster.config import DataSection
from rft_cluster.data.assemble import assemble
from rft_cluster.data.dataset import FewShotDataset, check_classes, composed, listing
from rft_cluster.data.files import (
    SUFFIXES,
    TABLE_SUFFIXES,
    LeftOut,
    count_others,
    entries,
    folders_in,
    pictures_in,
    read_file,
    some,
    tables_in,
)
from rft_cluster.data.names import chosen_names, find_splits, split_role
from rft_cluster.data.reading import Labelled, Unread, decoded
from rft_cluster.data.unseen import with_unseen

IMAGE_FOLDERS = {"images", "image", "imgs", "img", "pictures", "pics", "photos", "jpg", "jpeg", "png", "jpegimages"}
DEPTH = 4  # levels below data.path that are searched for the folder that the user may have meant


@dataclass(frozen=True)
class Layout:
    """The folder that holds the class folders of each split. Without splits there is only `train`."""

    parts: dict[str, Path]
    remarks: list[str]


def load_folder(config: DataSection, seed: int) -> FewShotDataset:
    """The data set in the folder `data.path`. Example ids are paths in it.

    Raises:
        UserError: the folder is missing or holds no classes, a class is empty or not in `data.classes`,
            images cannot be read (all are named, with the reason), or there are too few of them.
    """
    root = _root(config.path)
    left_out = LeftOut()
    layout = _layout(root, config, left_out)
    classes = {role: _class_folders(part, root, left_out) for role, part in layout.parts.items()}
    found = with_unseen(list(classes["train"]), [label for part in classes.values() for label in part], config)
    names = chosen_names(found, config)  # images of other classes are not read at all
    wanted = {
        role: {label: folder for label, folder in folders.items() if label in names or label not in found}
        for role, folders in classes.items()
    }
    files = {role: _files(root, folders, left_out) for role, folders in wanted.items()}
    parts = {role: _unread(root, layout.parts[role], paths, config) for role, paths in files.items()}
    dataset = assemble(root.name, parts, found, config, seed)
    return replace(dataset, remarks=[*layout.remarks, *left_out.notes(), *dataset.remarks])


# --- which folder is what


def _layout(root: Path, config: DataSection, left_out: LeftOut) -> Layout:
    folder = root
    remarks: list[str] = []
    for _ in range(DEPTH):
        folders = folders_in(folder, root, left_out)
        parts = _parts(folder, folders, root, config)
        if parts:
            _count_beside(folder, [f for f in folders if f not in parts.values()], left_out)
            return Layout(parts, remarks + _unlabelled(folders, parts))
        if len(folders) != 1 or pictures_in(folder) or _is_class(folders[0], root) or not _holds_pictures(folders[0]):
            break
        folder = folders[0]
        remarks = [f"the classes lie in {folder}, the one folder of data.path"]
    if not folders:
        above = f", or set data.path={folder.parent} where {folder.name}/ is a class" if pictures_in(folder) else ""
        raise UserError(
            f"data.path: {folder} has no sub-folders; put each class's images in one named as the class"
            f"{above}{_table_hint(root)}"
        )
    nested = [f for f in folders if not _is_class(f, root) and _holds_pictures(f)]
    if len(folders) == 1 or (nested and not any(_is_class(f, root) for f in folders)):
        raise UserError(_explain(root, nested or folders, config))
    hint = _table_hint(root)
    if hint and all(split_role(f.name) for f in folders):
        names = some([f"{f.name}/" for f in folders])
        raise UserError(f"data.path: {folder} holds pictures in {names}, but no class folders in them{hint}")
    _count_beside(folder, [], left_out)
    return Layout({"train": folder}, remarks)


def _parts(folder: Path, folders: list[Path], root: Path, config: DataSection) -> dict[str, Path]:
    """The folders of the splits, if `folders` are splits, which hold class folders; else an empty mapping."""
    named = {path.name: path for path in folders}
    if config.splits:
        found = find_splits(list(named), config.splits, str(folder))
        return {role: named[name] for role, name in found.items()}
    with_classes = {name: path for name, path in named.items() if _holds_classes(path, root)}
    found = find_splits(list(with_classes), {}, str(folder))
    return {role: named[name] for role, name in found.items()} if "train" in found and len(folders) > 1 else {}


def _unlabelled(folders: list[Path], parts: dict[str, Path]) -> list[str]:
    """Remarks on splits whose images have no labels, because they are not in class folders."""
    return [
        f"{path.name}/ has no class folders, so its images have no labels: they are left out"
        for path in folders
        if path not in parts.values() and split_role(path.name) and _holds_pictures(path)
    ]


def _is_class(folder: Path, root: Path) -> bool:
    return bool(_pictures_of(folder, root))


def _holds_classes(folder: Path, root: Path) -> bool:
    """Return True for a folder of class folders. Unlabelled pictures below, as test/images/a.jpg, do not count."""
    folders = folders_in(folder, root)
    if pictures_in(folder) or [f.name.casefold() in IMAGE_FOLDERS for f in folders] == [True]:
        return False
    return any(_is_class(f, root) for f in folders)


def _pictures_of(folder: Path, root: Path) -> list[Path]:
    """A class's pictures: those in its folder, or in its only sub-folder, as in rose/images/a.jpg."""
    pictures = pictures_in(folder)
    if pictures:
        return pictures
    below = folders_in(folder, root)
    return pictures_in(below[0]) if len(below) == 1 else []


def _holds_pictures(folder: Path, depth: int = DEPTH) -> bool:
    return bool(pictures_in(folder)) or (
        depth > 0 and any(_holds_pictures(f, depth - 1) for f in folders_in(folder, folder))
    )


def _count_beside(folder: Path, others: list[Path], left_out: LeftOut) -> None:
    """Count the pictures beside the folders that are used, and those in the folders `others`."""
    for picture in pictures_in(folder):
        left_out.beside(picture, f"beside the folders of {folder.name}/")
    for other in others:
        if _holds_pictures(other):
            left_out.folder(other, f"in {other.name}/")


def _explain(root: Path, nested: list[Path], config: DataSection) -> str:
    right = next((f for f in _below(root, DEPTH) if _works(f, root, config)), None)
    names = some([f"{folder.name}/" for folder in nested])
    cures = [f"set data.path={right}" if right else "set data.path to the folder that holds the classes"]
    if len(nested) > 1 and right in nested:
        cures = [
            f"where {names} are the classes, move the images in their sub-folders up into them",
            f"where {right.name}/ holds the classes, set data.path={right}",
        ]
    return (
        f"data.path: {root} must hold a folder of images for each of two classes or more, but it holds {names}: "
        f"{'; '.join(cures)}, or have train/, val/ and test/ there, each with its classes{_table_hint(root)}"
    )


def _below(folder: Path, depth: int) -> list[Path]:
    """All folders up to `depth` levels below, nearest first."""
    level, found = [folder], []
    for _ in range(depth):
        level = [below for one in level for below in folders_in(one, one)]
        found += level
    return found


def _works(folder: Path, root: Path, config: DataSection) -> bool:
    """Return True if the folder would work as data.path: it holds class folders, or splits that do."""
    folders = folders_in(folder, root)
    apart = config.model_copy(update={"splits": {}})
    return sum(_is_class(f, root) for f in folders) >= 2 or bool(_parts(folder, folders, root, apart))


def _table_hint(root: Path) -> str:
    tables = [table for folder in (root, *folders_in(root, root)) for table in tables_in(folder)]
    tables.sort(key=lambda table: split_role(table.stem) != "train" and "label" not in table.stem.lower())
    if not tables:
        return ""
    return f". If {tables[0].name} there says which image has which label: data.source=csv data.path={tables[0]}"


# --- its images


def _class_folders(part: Path, root: Path, left_out: LeftOut) -> dict[str, Path]:
    """Class folders by label, in NFC: some file systems store accents as separate characters."""
    folders = folders_in(part, root, left_out if part != root else None)
    labels = [composed(folder.name) for folder in folders]
    if len(labels) != len(set(labels)):
        check_classes(labels, None)  # says which
    return dict(zip(labels, folders, strict=True))


def _files(root: Path, folders: dict[str, Path], left_out: LeftOut) -> dict[str, list[Path]]:
    files = {}
    for label, folder in folders.items():
        files[label] = _pictures_of(folder, root)
        _count_rest(folder, files[label], root, left_out)
    empty = [
        f"{folder.relative_to(root)}/"
        + (" (its sub-folders do: move their images up)" if _holds_pictures(folder) else "")
        for label, folder in folders.items()
        if not files[label]
    ]
    if empty:
        raise UserError(
            f"these class folders in data.path ({root}) hold no image files ({' '.join(SUFFIXES)}); add "
            f"images or remove them:\n{listing(empty)}"
        )
    return files


def _count_rest(folder: Path, used: list[Path], root: Path, left_out: LeftOut) -> None:
    """Count the files of a class folder that are not used."""
    count_others(entries(folder), left_out)
    for below in folders_in(folder, root, left_out):
        if used and used[0].parent == below:
            _count_rest(below, used, root, left_out)
        else:
            left_out.folder(below, f"in sub-folders of {folder.name}/")


def _unread(root: Path, part: Path, files: dict[str, list[Path]], config: DataSection) -> Unread:
    examples = [Labelled(str(path.relative_to(root)), label) for label, paths in files.items() for path in paths]
    what = f"{len(examples)} image files in data.path ({part})"
    unread = decoded(examples, lambda example_id: read_file(root / example_id, root, config.max_bytes), what, config)
    return replace(unread, where=str(part))


def _root(path: Path | None) -> Path:
    if path is None:
        raise UserError("data.path is missing: data.source is folder, so set it to the folder with your images")
    root = path.absolute()
    if not root.exists():
        raise UserError(f"data.path: {root} does not exist{near_path(root)}")
    if not root.is_dir():
        hint = ". For a table of images and labels set data.source=csv" if root.suffix.lower() in TABLE_SUFFIXES else ""
        raise UserError(f"data.path: {root} is not a folder; it must hold a sub-folder of images for each class{hint}")
    return root
