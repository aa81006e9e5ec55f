"""One-hot labels, as Kaggle writes them: one column a class, 1 for the picture's class and 0 elsewhere.

    image,rose,tulip            image,label
    0001.jpg,1,0          ->    0001.jpg,rose
    0002.jpg,0,1                0002.jpg,tulip

Columns of yes/no properties (`indoors`) look alike, but most of their rows mark none or several of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from rft_cluster.common.errors import UserError
from rft_cluster.data.dataset import listing
from rft_cluster.data.files import some
from rft_cluster.data.table_text import Table

ZEROS, ONES = ("0", "0.0", "false", "no"), ("1", "1.0", "true", "yes")


def without_one_hot(table: Table, apart: Collection[int | None]) -> tuple[Table, list[str]]:
    """Replace one-hot columns by one column `label` at the end, and return a remark about it. Other tables stay.

    `apart`: the columns of images and splits, which hold no labels.

    Raises:
        UserError: some rows mark no class or several, or another column may hold the labels.
    """
    cells = [table.column(index) for index in range(len(table.header))]
    columns, marks = _one_hot_columns([[] if index in apart else column for index, column in enumerate(cells)])
    if not columns:
        return table, []
    names = [table.header[index] for index in columns]
    left = [index for index in range(len(cells)) if index not in apart and index not in columns]
    if rivals := [table.header[index] for index in left if _is_like_labels(cells[index])]:
        raise UserError(
            f"data.path: {table.path} may have a column for each class ({some(names)}), or the labels in "
            f"{' or '.join(rivals)}: set data.label_column, or remove the columns that hold no labels"
        )
    labels = _labels(names, marks, table)
    others = [[""] * len(labels) if index in columns else column for index, column in enumerate(cells)]
    rows = [(line, list(row)) for (line, _), row in zip(table.rows, zip(*others, labels, strict=True), strict=True)]
    remark = f"{table.path.name} has a column for each class ({some(names)}): the one with the 1 names the label"
    return replace(table, header=[*table.header, "label"], rows=rows), [remark]


def _one_hot_columns(columns: Sequence[Sequence[str]]) -> tuple[list[int], list[list[int]]]:
    """The one-hot columns: two or more that hold only 0 and 1, with exactly one 1 in most rows.

    Returns their indices, and for each row the positions among them that hold a 1.
    """
    found = [i for i, cells in enumerate(columns) if cells and {cell.casefold() for cell in cells} <= {*ZEROS, *ONES}]
    if len(found) < 2:
        return [], []
    rows = zip(*(columns[i] for i in found), strict=True)
    marks = [[position for position, cell in enumerate(row) if cell.casefold() in ONES] for row in rows]
    return (found, marks) if 2 * sum(len(mark) == 1 for mark in marks) > len(marks) else ([], [])


def _is_like_labels(cells: Sequence[str]) -> bool:
    """Return True for a column with a few repeated texts that are not numbers."""
    texts = {cell for cell in cells if cell}
    return 2 <= len(texts) <= len(cells) / 2 and not any(cell[0].isdigit() for cell in texts)


def _labels(names: list[str], marks: Sequence[Sequence[int]], table: Table) -> list[str]:
    """The label of each row: the name of the column with the 1."""
    wrong = [
        f"line {line}: {' and '.join(names[i] for i in mark) or 'none'}"
        for (line, _), mark in zip(table.rows, marks, strict=True)
        if len(mark) != 1
    ]
    if wrong:
        raise UserError(
            f"data.path: {table.path} has a column for each class ({some(names)}), and these rows do not mark one of "
            f"them; a classifier answers with one, so leave such rows out:\n{listing(wrong)}"
        )
    return [names[mark[0]] for mark in marks]
