"""The answers of an evaluation: one object an image, in `evaluations/step-000080-test.jsonl`.

    {"example_id": "rose/a.jpg", "label": "rose", "text": "<think>...</think><answer>tulip</answer>",
     "predicted": "tulip", "strict": false, "lenient": false, "formatted": true}

From these come the confusion matrix, the table by class, and the comparison of two runs image by image. The answers to
the images of `evaluation.also` stand here alone, in `step-000080-also.jsonl`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import write_text
from rft_cluster.run.records import json_lines

ALSO = "also"  # the images of `evaluation.also`
SPLITS = ("validation", "test", ALSO)  # that are evaluated
_ROW = TypeAdapter(Judged)


def answers_file(run: Path, step: int, split: str) -> Path:
    return run / "evaluations" / f"step-{step:06d}-{split}.jsonl"


def evaluated_step(file: Path) -> int:
    """The step of a file of `answers_file`."""
    return int(file.name.split("-")[1])


def write_answers(run: Path, step: int, split: str, judged: Sequence[Judged]) -> None:
    file = answers_file(run, step, split)
    file.parent.mkdir(exist_ok=True)
    write_text(file, json_lines(map(asdict, judged)))


def read_answers(run: Path, step: int, split: str) -> list[Judged]:
    """The answers of an evaluation; empty without a file, as in runs of earlier versions.

    In a stranger's run a link, or another word in the place of a split, might lead elsewhere: it is passed over.

    Raises:
        UserError: the file is damaged.
    """
    file = answers_file(run, step, split)
    if split not in SPLITS or file.is_symlink() or not file.is_file():
        return []
    judged = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            judged.append(_ROW.validate_json(line, strict=True))
        except ValidationError as error:
            raise UserError(f"{file}, line {number} is damaged: remove the file to do without its answers") from error
    return judged
