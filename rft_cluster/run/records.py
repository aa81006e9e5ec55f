"""Read `metrics.jsonl` and `eval.jsonl`: one object a line. A process that died may have left half a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import json_object, naming, write_text

ROWS = ("metrics.jsonl", "eval.jsonl")  # files of a run with a row for each step, or for each evaluation


def append(path: Path, row: Mapping[str, Any]) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json_lines([row]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; empty if the file is missing. An incomplete last line is ignored.

    Raises:
        UserError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}, line {number} is damaged: remove that line, or the file to do without its record")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    row = json_object(line)
    return row if row is not None and isinstance(row.get("step"), int) else None


def steps_in(path: Path) -> list[int]:
    """The steps of a file's whole rows. Damaged lines are passed over; empty if there is no such file."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row["step"] for line in lines if (row := _row(line))]


def split_rows(path: Path, aside: Path, last_step: int) -> list[int]:
    """Keep the rows up to `last_step` in `path`, and move rows of later steps, which will be done again, to `aside`.

    Returns the steps of the moved rows. An incomplete last line is dropped.
    """
    rows = read_rows(path)
    moved = [row for row in rows if row["step"] > last_step]
    if moved:
        aside.parent.mkdir(parents=True, exist_ok=True)
        write_text(aside, json_lines(moved))
    if path.exists():
        write_text(path, json_lines([row for row in rows if row["step"] <= last_step]))
    return [row["step"] for row in moved]


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """A text with an object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
