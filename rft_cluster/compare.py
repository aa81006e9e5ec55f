"""Compare two policies: python -m rft_cluster.compare FIRST/evaluation.json SECOND/evaluation.json

Both must have been evaluated on the same images. The difference is taken image by image, with its 95 % interval.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from rft_cluster.classification.report import compare, knows_pixels
from rft_cluster.common.errors import UserError, end_with, exit_code
from rft_cluster.common.lookup import near_path
from rft_cluster.common.text import shown


class _Prediction(BaseModel):
    id: str
    label: str
    strict: bool
    voted: str | None
    pixels: str = ""


class _Evaluation(BaseModel):
    """The keys of evaluation.json that are read; others are ignored."""

    predictions: list[_Prediction] = Field(min_length=1)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 for a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(prog="python -m rft_cluster.compare", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> None:
    reports = _read(options.first), _read(options.second)
    figures = compare(*reports)
    if not all(map(knows_pixels, reports)):
        print(
            "note: an older evaluation has no digests of its pictures: matched by id and label only",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for name, row in figures.items():
        low, high = (100 * end for end in row["interval"])
        print(
            f"{name}: second - first {100 * row['difference']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}; "
            f"p {row['p']:.2g}); right only in the first {row['only_first']}, only in the second {row['only_second']} "
            f"of {row['n']} images"
        )


def _read(path: Path) -> dict[str, Any]:
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        data = file.read_bytes()
        rows = _Evaluation.model_validate_json(data, strict=True).predictions
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}{near_path(file)}") from error
    except ValidationError as error:
        first, *more = (f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors())
        rest = f", and {len(more)} more" if more else ""
        raise UserError(f"{file} is no evaluation that rft_cluster.evaluate wrote: {shown(first)}{rest}") from error
    if len({row.id for row in rows}) < len(rows):
        raise UserError(f"{file} contradicts itself: it has a picture twice")
    whole: dict[str, Any] = json.loads(data)
    return whole


if __name__ == "__main__":
    end_with(main)
