"""Read a CSV file into rows of cells, with their line numbers."""

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rft_cluster.common.errors import UserError

DELIMITERS = ",;\t|"
SEPARATOR = re.compile(r"sep=([,;\t|])\r?\n", re.IGNORECASE)  # Excel's first line that declares the delimiter
MAX_TABLE = 200_000_000  # bytes; a line an image


@dataclass(frozen=True)
class Table:
    """`rows` are (line number in the file, cells), without empty lines. `header` is empty if there is none."""

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]

    def column(self, index: int) -> list[str]:
        return [cells[index].strip() if index < len(cells) else "" for _, cells in self.rows]

    def name(self, index: int) -> str:
        return repr(self.header[index]) if self.header else f"number {index + 1}"


def read_table(path: Path) -> Table:
    if path.stat().st_size > MAX_TABLE:
        raise UserError(f"data.path: {path} is larger than {MAX_TABLE // 10**6} MB: that is no table of images")
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {path} is not UTF-8 text ({error}); save it as CSV UTF-8") from error
    if "\0" in text:  # a spreadsheet's binary format, or UTF-16 without a byte order mark
        raise UserError(f"data.path: {path} is not UTF-8 text (it holds zero bytes); save it as CSV UTF-8")
    skipped = 0
    said = SEPARATOR.match(text)
    if said:
        text, skipped = text[said.end() :], 1
    delimiter = said[1] if said else _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num + skipped, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"data.path: {path} cannot be read as a table: {error}, in the row that begins in line {line + skipped}. "
            f'A quote (") is never closed there, or more than a {delimiter} follows it'
        ) from error
    if not rows:
        raise UserError(f"data.path: {path} is empty")
    if max(len(cells) for _, cells in rows) < 2:
        raise UserError(f"data.path: {path} has one column; it needs one of images and one of labels, with a , between")
    return Table(path, [], rows)


def _delimiter(text: str) -> str:
    """The delimiter that splits the first lines into equally many cells; if several do, the one with the most cells."""
    lines = [line for line in text.splitlines() if line.strip()][:50]

    def score(delimiter: str) -> tuple[int, int]:
        try:
            cells = Counter(len(row) for row in csv.reader(lines, delimiter=delimiter))
        except csv.Error:  # a wrong delimiter may make one cell of a long line, which is more than the reader takes
            return 0, 0
        width, times = max(cells.items(), key=lambda item: (item[1], item[0]), default=(1, 0))
        return (times if width > 1 else 0), width

    return max(DELIMITERS, key=score)
