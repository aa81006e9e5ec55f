"""Load a CSV table of images and labels, as Kaggle and spreadsheets write it, with the pictures beside or below it.

    image,label
    0001.jpg,rose
    0002,tulip          the suffix may be missing

Columns are guessed where only one fits. The image column holds names of existing files. The label column is the other
one of two, or is called label, class, species or the like. A column `split` assigns images to training, validation and
test. Paths that lead out of the folder are refused.
"""

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import near_path
from rft_cluster.config import DataSection
from rft_cluster.data.assemble import assemble
from rft_cluster.data.dataset import FewShotDataset, composed, listing
from rft_cluster.data.files import (
    TABLE_SUFFIXES,
    folders_in,
    is_picture,
    read_file,
    some,
    tables_in,
)
from rft_cluster.data.names import ROLES, find_splits, given, named_numbers, split_role
from rft_cluster.data.one_hot import without_one_hot
from rft_cluster.data.reading import Labelled, Unread, decoded, skip_or_refuse
from rft_cluster.data.table_text import Table, read_table

IMAGE_WORDS = ("image", "images", "img", "picture", "photo", "file", "filename", "filepath", "path", "imagepath",
               "imagename", "imagefile", "imageid", "imgpath", "imgname", "id")  # fmt: skip
LABEL_WORDS = ("label", "labels", "class", "classname", "category", "target", "species", "breed", "diagnosis", "y")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
NAME_COLUMNS = "Put a first line into it that names the columns, e.g. image,label"


class Files:
    """Finds pictures below `root` by the names in a table: a path or a file name, with or without the suffix.

    Case does not matter (cameras write .JPG). `table` is the folder of the table, for relative paths.
    """

    def __init__(self, root: Path, table: Path) -> None:
        self.root, self._table = root, table
        self.pictures: list[Path] = []
        self._by_name: dict[str, list[Path]] = {}
        self._folders = _folders_below(root)
        self._written: dict[PurePosixPath, PurePosixPath] = {}  # a folder as a table writes it -> as it is found
        for folder in self._folders.values():
            for path in sorted(folder.iterdir()):
                if is_picture(path):
                    self.pictures.append(path)
                    inside = path.relative_to(root)
                    for name in (inside.as_posix(), path.name, inside.with_suffix("").as_posix(), path.stem):
                        if path not in self._by_name.setdefault(_key(name), []):
                            self._by_name[_key(name)].append(path)

    def find(self, name: str) -> list[Path]:
        """All files that `name` may mean. If `name` is the exact path of a file, only that file."""
        path = self._inside(PurePosixPath(name.replace("\\", "/")))
        found = self._by_name.get(_key(str(path)), [])
        for same in (composed, _key):
            exact = [file for file in found if same(file.relative_to(self.root).as_posix()) == same(str(path))]
            if exact:
                return exact
        return found or self._through_links(path)

    def _through_links(self, path: PurePosixPath) -> list[Path]:
        """The files that a path may mean in which a folder is a link."""
        if path.parent not in self._written:  # asked about every cell of a table
            # Unlike `resolve`, without an error for links in a circle.
            known = self._folders.get(Path(os.path.realpath(self.root / path.parent)))
            self._written[path.parent] = PurePosixPath(known.relative_to(self.root)) if known else path.parent
        folder = self._written[path.parent]
        return [] if folder == path.parent else self.find(str(folder / path.name))

    def _inside(self, path: PurePosixPath) -> PurePosixPath:
        """Turn an absolute path, or one with `..`, into a path relative to `root`, if it leads there."""
        if path.is_absolute() or ".." in path.parts:
            whole = Path(os.path.normpath(self._table / path))
            for root in (self.root, self.root.resolve()):
                if whole.is_relative_to(root):
                    return PurePosixPath(whole.relative_to(root))
        return path


def load_table(config: DataSection, seed: int) -> FewShotDataset:
    """The data set of the table in `data.path`. Example ids are the pictures' paths in its folder.

    Raises:
        UserError: there is no table or more than one, its columns cannot be determined, rows have no label or name no
            picture (each with its line number), or as for a folder.
    """
    path = _table_file(config.path)
    table = read_table(path)
    root = (config.images or path.parent).absolute()
    if not root.is_dir():
        raise UserError(
            f"data.images: {root} is not a folder; it must be the one with the pictures of {path.name}{near_path(root)}"
        )
    files = Files(root, path.parent)
    table, image = _image_column(table, files, config)
    named = config.label_column is not None or any(_plain(name) in LABEL_WORDS for name in table.header)
    split = _split_column(table, image, config)
    table, one_hot = (table, []) if named else without_one_hot(table, {image, split})
    label = _label_column(table, image, config)
    written = table.column(label)
    labels = named_numbers([given(text, config.classes) for text in written], config.classes)
    labelled, bad = _labelled(table, table.column(image), list(zip(written, labels, strict=True)), files)
    skip_or_refuse(bad, f"{len(table.rows)} rows of {path}", config)
    roles = _roles(table, split, config)
    parts: dict[str, Unread] = {}
    unused = sum(not role for role in roles.values())
    for role in (role for role in ROLES if role in roles.values()):
        examples = [e for e, line in labelled if roles[line] == role]
        what = f"{len(examples)} images that {path} names"
        part = decoded(examples, lambda i: read_file(root / i, root, config.max_bytes), what, config)
        parts[role] = replace(part, where=f"split {role} of {path.name}")
    dataset = assemble(path.stem, parts, sorted({e.label for e in parts["train"].examples}), config, seed)
    remarks = one_hot + _remarks(table, (image, label, split), len(labelled), len(bad), files)
    remarks += [f"{unused} rows belong to no split and are left out"] if unused else []
    return replace(dataset, remarks=remarks + dataset.remarks, skipped=bad | dataset.skipped)


def _remarks(table: Table, columns: tuple[int, int, int | None], used: int, bad: int, files: Files) -> list[str]:
    image, label, split = columns
    remark = f"{table.path.name}: images from column {table.name(image)}, labels from column {table.name(label)}"
    remarks = [remark + (f", splits from column {table.name(split)}" if split is not None else "")]
    again, unnamed = len(table.rows) - bad - used, len(files.pictures) - used
    if again:
        remarks.append(f"{again} rows name a picture again that an earlier one names")
    if unnamed > 0:
        remarks.append(f"left out {unnamed} pictures in {files.root} that no row names")
    return remarks


# --- the file


def _table_file(path: Path | None) -> Path:
    if path is None:
        raise UserError("data.path is missing: data.source is csv, so set it to the table, or to the folder with it")
    where = path.absolute()
    if where.is_file():
        return where
    if not where.is_dir():
        problem = "is neither a file nor a folder" if where.exists() else f"does not exist{near_path(where)}"
        raise UserError(f"data.path: {where} {problem}")
    tables = tables_in(where)
    if len(tables) == 1:
        return tables[0]
    if tables:
        lines = listing([f"data.path={table}" for table in tables])
        raise UserError(f"data.path: {where} holds {len(tables)} tables; name the one to learn from:\n{lines}")
    raise UserError(f"data.path: {where} holds no table ({' '.join(TABLE_SUFFIXES)})")


# --- its columns


def _key(name: str) -> str:
    return composed(name).casefold()


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def _image_column(table: Table, files: Files, config: DataSection) -> tuple[Table, int]:
    """Separate the header from the rows, and find the image column: the one that names the most existing files."""
    first = [cell.strip() for cell in table.rows[0][1]]
    with_header = replace(table, header=first, rows=table.rows[1:])
    data = any(files.find(cell) or is_picture(Path(cell)) for cell in first if cell)
    if not with_header.rows and (config.image_column or not data):
        raise UserError(f"data.path: {table.path} has a header and no rows: it needs one for each image")
    if config.image_column is not None:
        if config.image_column not in first:
            raise UserError(
                f"data.image_column: {table.path} has no column {config.image_column!r}; it has {', '.join(first)}"
            )
        return with_header, first.index(config.image_column)
    if not data or config.label_column in first:
        table = with_header
    width = max((len(cells) for _, cells in table.rows), default=0)
    there = {index: _matches(table.column(index), files) for index in range(width)}
    most = max(there.values(), default=(0, 0))
    best = [index for index, count in there.items() if count == most]
    if most > (0, 0):
        named = [i for i in best if i < len(table.header) and _plain(table.header[i]) in IMAGE_WORDS]
        return table, (named or best)[0]
    columns = ", ".join(table.header) or f"{width} columns and no header"
    first = [cell.strip() for cell in table.rows[0][1]]
    hint = next((f", or write the paths in that folder{near}" for cell in first if (near := _near(cell, files))), "")
    raise UserError(
        f"data.path: no column of {table.path} names pictures below {files.root} ({columns}; first row: "
        f"{', '.join(first)}). Set data.images to the folder with the pictures, or data.image_column to the column"
        f"{hint}"
    )


def _matches(names: list[str], files: Files) -> tuple[int, int]:
    """(names of existing pictures with their suffix, names of existing pictures at all).

    Names with a suffix count first: a column of numbers may match file names by chance.
    """
    found = [name for name in names if name and files.find(name)]
    return sum(is_picture(Path(name)) for name in found), len(found)


def _label_column(table: Table, image: int, config: DataSection) -> int:
    header = table.header
    if config.label_column is not None:
        if config.label_column in header:
            return header.index(config.label_column)
        known = ", ".join(header) or f"no header. {NAME_COLUMNS}"
        raise UserError(f"data.label_column: {table.path} has no column {config.label_column!r}; it has {known}")
    width = max(len(cells) for _, cells in table.rows) if table.rows else len(header)
    others = [index for index in range(width) if index != image and (any(table.column(index)) or not table.rows)]
    named = [i for i in others if i < len(header) and _plain(header[i]) in LABEL_WORDS]
    others = [i for i in others if not (i < len(header) and _plain(header[i]) in SPLIT_COLUMNS)] or others
    fitting = named if len(named) == 1 else others
    if len(fitting) == 1:
        return fitting[0]
    names = [header[i] for i in (named or others) if i < len(header)]
    cure = f"Set data.label_column to one of {', '.join(names)}" if names else NAME_COLUMNS
    raise UserError(f"data.path: which column of {table.path} holds the labels? {cure}")


def _split_column(table: Table, image: int, config: DataSection) -> int | None:
    for index, name in enumerate(table.header):
        values = {value for value in table.column(index) if value}
        if index == image or _plain(name) not in SPLIT_COLUMNS or not values:
            continue
        if config.splits or all(map(split_role, values)):
            return index
    if config.splits:
        raise UserError(f"data.splits: {table.path} has no column called {' or '.join(SPLIT_COLUMNS)}")
    return None


def _roles(table: Table, split: int | None, config: DataSection) -> dict[int, str]:
    """The split of each row, by its line number."""
    if split is None:
        return {line: "train" for line, _ in table.rows}
    values = table.column(split)
    found = find_splits(sorted(set(values) - {""}), config.splits, f"column {table.name(split)} of {table.path}")
    if "train" not in found:
        raise UserError(
            f"data.path: column {table.name(split)} of {table.path} has no rows for training: "
            f"{some(sorted(set(values)))}"
        )
    role_of = {value: role for role, value in found.items()}
    return {line: role_of.get(value, "") for (line, _), value in zip(table.rows, values, strict=True)}


# --- its rows


def _labelled(
    table: Table, names: list[str], labels: list[tuple[str, str | None]], files: Files
) -> tuple[list[tuple[Labelled, int]], dict[str, str]]:
    """The examples with their line numbers, one a picture, and the problems of all other rows by line.

    `labels` are pairs: the text in the table, and the label it means or None.

    Raises:
        UserError: a picture has two labels.
    """
    examples: dict[str, tuple[Labelled, int]] = {}
    bad, twice = {}, []
    for (line, _), name, (text, label) in zip(table.rows, names, labels, strict=True):
        written = f" (but {text!r}; if that is a class, name it in data.classes)" if text else ""
        found = files.find(name) if name else []
        where = f"line {line}"
        if len(found) != 1:
            bad[where] = _why(name, found, files)
        elif not label:
            bad[where] = f"{name} has no label{written}"
        else:
            example = Labelled(str(found[0].relative_to(files.root)), composed(label).strip())
            known, before = examples.setdefault(example.example_id, (example, line))
            if known.label != example.label:
                twice.append(
                    f"{example.example_id}: {known.label!r} in line {before}, {example.label!r} in line {line}"
                )
    if twice:
        raise UserError(
            f"data.path: {table.path} gives these images several labels; a classifier answers with one, so leave one "
            f"row each:\n{listing(twice)}"
        )
    return list(examples.values()), bad


def _why(name: str, found: list[Path], files: Files) -> str:
    root = files.root
    if not name:
        return "names no image"
    if found:
        return (
            f"{name} may be {some([str(path.relative_to(root)) for path in found])}: write its path, or set data.images"
        )
    path = PurePosixPath(name.replace("\\", "/"))
    hint = _near(name, files)
    if (path.is_absolute() or ".." in path.parts) and "://" not in name:
        return f"{name} leads out of the folder; write the path in {root}, or set data.images{hint}"
    return f"no picture {name} below {root}{hint or '; data.images names another folder'}"


def _near(name: str, files: Files) -> str:
    """A hint for a message: the only picture with this name in another folder or with another suffix, if any."""
    path = PurePosixPath(name.replace("\\", "/"))
    near = [str(file.relative_to(files.root)) for file in files.find(path.name) or files.find(path.stem)]
    return f"; there is {near[0]}" if len(near) == 1 else ""


def _folders_below(root: Path) -> dict[Path, Path]:
    """The folder and those below it, by their real paths. Each is there once, though links may lead to it, or from it
    to one above: under its own name, or under a link's if only links lead to it."""
    links: list[Path] = []
    level, found = [root], {root.resolve(): root}
    while level or links:
        below = [path for folder in level for path in folders_in(folder, root)]
        links += [path for path in below if path.is_symlink()]
        level = [path for path in below if not path.is_symlink()]
        if not level:
            level, links = links, []
        level = list({real: path for path in level if (real := path.resolve()) not in found}.values())
        found |= {path.resolve(): path for path in level}
    return found
