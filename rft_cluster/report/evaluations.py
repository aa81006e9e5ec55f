"""The answers at evaluations, for the page: the confusion matrix, its cells' images, and the table by class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rft_cluster.classification.intervals import rate
from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import UserError
from rft_cluster.data.dataset import NO_CLASS
from rft_cluster.run.answers import read_answers
from rft_cluster.run.history import History, Row

MOST_TEXT = 600  # characters of an answer to a test image


def kept(history: History) -> list[Row]:
    """The evaluations whose answers a page shows: all of the test; the first, best and last of the validation."""
    rows = [row for row in history.evaluations if "accuracy_strict" in row]
    validation = [row for row in rows if row["split"] == "validation"]
    best = max(validation, key=lambda row: row["accuracy_strict"], default=None)
    wanted = [*validation[:1], *([best] if best else []), *validation[-1:]]
    return [row for row in rows if row["split"] != "validation" or any(row is one for one in wanted)]


def answers(history: History, problems: list[str]) -> list[tuple[Row, list[Judged]]]:
    """The kept evaluations with their answers. What is damaged is added to `problems`; older versions kept none."""
    found = []
    for row in kept(history):
        try:
            judged = read_answers(history.folder, row["step"], row["split"])
        except UserError as error:
            problems.append(str(error))
            continue
        if judged:
            found.append((row, judged))
    return found


def for_page(
    found: Sequence[tuple[Row, list[Judged]]], images: dict[str, int], classes: dict[str, int]
) -> list[dict[str, Any]]:
    """The answers in columns: numbers of image, label and answered class (-1: none), whether right, and the text."""
    return [
        {
            "step": row["step"],
            "split": row["split"],
            "image": [images.setdefault(one.example_id, len(images)) for one in judged],
            "label": [classes.setdefault(one.label, len(classes)) for one in judged],
            "answer": [-1 if one.predicted is None else classes.get(one.predicted, -1) for one in judged],
            "text": [one.text[:MOST_TEXT] for one in judged],
        }
        for row, judged in found
    ]


def ends(found: Sequence[tuple[Row, list[Judged]]]) -> list[tuple[Row, list[Judged]]]:
    """The first and the last of the test, or of the validation as long as only the untrained policy was tested. One of
    them if there is no other."""
    split = "test" if any(row["split"] == "test" and row["step"] for row, _ in found) else "validation"
    own = [one for one in found if one[0]["split"] == split] or list(found)
    return [own[0], own[-1]] if len(own) > 1 else own


def by_class(first: Sequence[Judged], last: Sequence[Judged], classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class with images: its rates at two evaluations, and what it is taken for at the last. `first`:
    empty if there was one only."""
    answered = Counter(one.predicted for one in last)
    rows = []
    for label in classes:
        before, after = ([one.strict for one in side if one.label == label] for side in (first, last))
        if after:
            wrong = Counter(one.predicted or NO_CLASS for one in last if one.label == label and not one.strict)
            rows.append({"label": label, "before": rate(before) if before else None, "after": rate(after),
                         "answered": answered[label], "taken_for": wrong.most_common(3)})  # fmt: skip
    return rows
