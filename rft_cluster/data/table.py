"""A table of images and labels, as Kaggle and spreadsheets write it: a CSV file, and the pictures beside or below it.

    image,label
    0001.jpg,rose
    0002,tulip          the suffix may be missing

The columns are guessed where only one can be meant: the image column holds names of files that are there, the label
column is the other one of two or is called label, class, species or the like. A column `split` says which images are
for training, validation and test. Paths lead nowhere but below the folder.
"""

import csv
import io
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from rft_cluster.common.errors import UserError
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
from rft_cluster.data.names import ROLES, find_splits, named_numbers, split_role
from rft_cluster.data.reading import Unread, decoded, skip_or_refuse
from rft_cluster.messages import Example

DELIMITERS = ",;\t|"
IMAGE_WORDS = ("image", "images", "img", "picture", "photo", "file", "filename", "filepath", "path", "imagepath",
               "imagename", "imagefile", "imageid", "imgpath", "imgname", "id")  # fmt: skip
LABEL_WORDS = ("label", "labels", "class", "classname", "category", "target", "species", "breed", "diagnosis", "y")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
MAX_TABLE = 200_000_000  # bytes; a line an image


@dataclass(frozen=True)
class Table:
    """`rows` are (number of the line in the file, cells), without empty lines; `header` is empty if there is none."""

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]

    def column(self, index: int) -> list[str]:
        return [cells[index].strip() if index < len(cells) else "" for _, cells in self.rows]

    def name(self, index: int) -> str:
        return repr(self.header[index]) if self.header else f"number {index + 1}"


class Files:
    """The pictures below a folder, found by what a table calls them: a path, a name, either without its suffix."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures: list[Path] = []
        self._by_name: dict[str, list[Path]] = {}
        for folder in _folders_below(root):
            for path in sorted(folder.iterdir()):
                if is_picture(path):
                    self.pictures.append(path)
                    inside = path.relative_to(root)
                    for name in (inside.as_posix(), path.name, inside.with_suffix("").as_posix(), path.stem):
                        if path not in self._by_name.setdefault(composed(name), []):
                            self._by_name[composed(name)].append(path)

    def find(self, name: str) -> list[Path]:
        """All files that `name` may mean; that of the very path alone, where it is one."""
        path = PurePosixPath(name.replace("\\", "/"))
        key = composed(str(path))
        found = self._by_name.get(key, [])
        exact = [file for file in found if composed(file.relative_to(self.root).as_posix()) == key]
        return exact or found


def load_table(config: DataSection, seed: int) -> FewShotDataset:
    """The data set of the table in `data.path`. Example ids are the pictures' paths in its folder.

    Raises:
        UserError: there is no such table or several, its columns cannot be told, rows have no label or name no
            picture (each with its line number), or as for a folder.
    """
    path = _table_file(config.path)
    table = _read_table(path)
    root = (config.images or path.parent).absolute()
    if not root.is_dir():
        raise UserError(f"data.images: {root} is not a folder; it must be the one with the pictures of {path.name}")
    files = Files(root)
    table, image = _image_column(table, files, config)
    label, split = _label_column(table, image, config), _split_column(table, image, config)
    labels = named_numbers([text or None for text in table.column(label)], config.classes)
    labelled, bad = _labelled(table, table.column(image), labels, files)
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
    remarks = _remarks(table, (image, label, split), len(labelled), len(bad), files)
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
        raise UserError(f"data.path: {where} does not exist")
    tables = tables_in(where)
    if len(tables) == 1:
        return tables[0]
    if tables:
        lines = listing([f"data.path={table}" for table in tables])
        raise UserError(f"data.path: {where} holds {len(tables)} tables; name the one to learn from:\n{lines}")
    raise UserError(f"data.path: {where} holds no table ({' '.join(TABLE_SUFFIXES)})")


def _read_table(path: Path) -> Table:
    if path.stat().st_size > MAX_TABLE:
        raise UserError(f"data.path: {path} is larger than {MAX_TABLE // 10**6} MB: that is no table of images")
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
        delimiter = _delimiter(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=False)
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {path} is not UTF-8 text ({error}); save it as CSV UTF-8") from error
    except csv.Error as error:
        raise UserError(f"data.path: {path} cannot be read as a table: {error}") from error
    if not rows:
        raise UserError(f"data.path: {path} is empty")
    if max(len(cells) for _, cells in rows) < 2:
        raise UserError(f"data.path: {path} has one column; it needs one of images and one of labels, with a , between")
    return Table(path, [], rows)


def _delimiter(text: str) -> str:
    """The one that cuts the first lines into as many cells each; of several the one that gives most cells."""
    lines = [line for line in text.splitlines() if line.strip()][:50]

    def score(delimiter: str) -> tuple[int, int]:
        cells = Counter(len(row) for row in csv.reader(lines, delimiter=delimiter))
        width, times = max(cells.items(), key=lambda item: (item[1], item[0]), default=(1, 0))
        return (times if width > 1 else 0), width

    return max(DELIMITERS, key=score)


# --- its columns


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def _image_column(table: Table, files: Files, config: DataSection) -> tuple[Table, int]:
    """The table with its header set apart, and the column of images: the one that names most files that are there."""
    first = [cell.strip() for cell in table.rows[0][1]]
    with_header = replace(table, header=first, rows=table.rows[1:])
    if config.image_column is not None:
        if config.image_column not in first:
            raise UserError(
                f"data.image_column: {table.path} has no column {config.image_column!r}; it has {', '.join(first)}"
            )
        return with_header, first.index(config.image_column)
    data = any(files.find(cell) or is_picture(Path(cell)) for cell in first if cell)
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
    raise UserError(
        f"data.path: no column of {table.path} names pictures below {files.root} ({columns}; first row: "
        f"{', '.join(table.rows[0][1]) if table.rows else 'none'}). Set data.images to the folder with the pictures, "
        f"or data.image_column to the column"
    )


def _matches(names: list[str], files: Files) -> tuple[int, int]:
    """How many of the names are pictures that are there: with their suffix, and at all. A column of numbers may happen
    to be names as well, of other pictures."""
    found = [name for name in names if name and files.find(name)]
    return sum(is_picture(Path(name)) for name in found), len(found)


def _label_column(table: Table, image: int, config: DataSection) -> int:
    header = table.header
    if config.label_column is not None:
        if config.label_column in header:
            return header.index(config.label_column)
        raise UserError(
            f"data.label_column: {table.path} has no column {config.label_column!r}; it has "
            f"{', '.join(header) or 'no header'}"
        )
    width = max(len(cells) for _, cells in table.rows) if table.rows else len(header)
    others = [index for index in range(width) if index != image and (any(table.column(index)) or not table.rows)]
    named = [i for i in others if i < len(header) and _plain(header[i]) in LABEL_WORDS]
    others = [i for i in others if not (i < len(header) and _plain(header[i]) in SPLIT_COLUMNS)] or others
    fitting = named if len(named) == 1 else others
    if len(fitting) == 1:
        return fitting[0]
    names = [header[i] for i in (named or others) if i < len(header)] or [f"{width} columns without a header"]
    raise UserError(
        f"data.path: which column of {table.path} holds the labels? Set data.label_column to one of {', '.join(names)}"
    )


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
    table: Table, names: list[str], labels: list[str | None], files: Files
) -> tuple[list[tuple[Example, int]], dict[str, str]]:
    """The examples with their lines, each picture once; and what is wrong with other rows, by line.

    Raises:
        UserError: a picture has two labels.
    """
    examples: dict[str, tuple[Example, int]] = {}
    bad, twice = {}, []
    for (line, _), name, label in zip(table.rows, names, labels, strict=True):
        found = files.find(name) if name else []
        where = f"line {line}"
        if len(found) != 1:
            bad[where] = _why(name, found, files.root)
        elif not label:
            bad[where] = f"{name} has no label"
        else:
            example = Example(str(found[0].relative_to(files.root)), b"", composed(label).strip())
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


def _why(name: str, found: list[Path], root: Path) -> str:
    if not name:
        return "names no image"
    if found:
        return (
            f"{name} may be {some([str(path.relative_to(root)) for path in found])}: write its path, or set data.images"
        )
    if (PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts) and "://" not in name:
        return f"{name} leads out of the folder; write the path in {root}, or set data.images"
    return f"no picture {name} below {root}; data.images names another folder"


def _folders_below(root: Path) -> list[Path]:
    level, found = [root], [root]
    while level:
        level = [below for folder in level for below in folders_in(folder, root)]
        found += level
    return found
