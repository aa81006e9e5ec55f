"""Labels as a column a class, as Kaggle writes them: 1 in that of the picture's class and 0 in the others.

    image,rose,tulip            image,label
    0001.jpg,1,0          ->    0001.jpg,rose
    0002.jpg,0,1                0002.jpg,tulip

Columns of zeros and ones that are properties of a picture (`indoors`) look alike: they are told by their rows, which
mark none of them or several.
"""

from collections.abc import Sequence
from dataclasses import replace

from rft_cluster.common.errors import UserError
from rft_cluster.data.dataset import listing
from rft_cluster.data.files import some
from rft_cluster.data.table_text import Table

ZEROS, ONES = ("0", "0.0", "false", "no"), ("1", "1.0", "true", "yes")


def without_one_hot(table: Table, image: int) -> tuple[Table, list[str]]:
    """The table with a column `label` at its end in place of a column a class, if its labels stand like that, and a
    remark that says so.

    Raises:
        UserError: rows mark no class or several.
    """
    cells = [table.column(index) for index in range(len(table.header))]
    columns = _one_hot_columns([[] if index == image else column for index, column in enumerate(cells)])
    if not columns:
        return table, []
    names = [table.header[index] for index in columns]
    labels = _labels(names, [cells[index] for index in columns], table)
    others = [[""] * len(labels) if index in columns else column for index, column in enumerate(cells)]
    rows = [(line, list(row)) for (line, _), row in zip(table.rows, zip(*others, labels, strict=True), strict=True)]
    remark = f"{table.path.name} has a column for each class ({some(names)}): the label is the one that is 1"
    return replace(table, header=[*table.header, "label"], rows=rows), [remark]


def _one_hot_columns(columns: Sequence[Sequence[str]]) -> list[int]:
    """Indices of the columns of cells that together are one label: two or more with nothing but zeros and ones, and one
    of them in most rows."""
    found = [i for i, cells in enumerate(columns) if cells and {cell.casefold() for cell in cells} <= {*ZEROS, *ONES}]
    if len(found) < 2:
        return []
    marks = [_marked(row) for row in zip(*(columns[i] for i in found), strict=True)]
    return found if 2 * sum(len(mark) == 1 for mark in marks) > len(marks) else []


def _labels(names: list[str], columns: Sequence[Sequence[str]], table: Table) -> list[str]:
    """The label of each row: the name of the column that is 1 there."""
    marks = [_marked(row) for row in zip(*columns, strict=True)]
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


def _marked(row: Sequence[str]) -> list[int]:
    return [i for i, cell in enumerate(row) if cell.casefold() in ONES]
