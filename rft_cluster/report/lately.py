"""What hints are made of: means of the last steps, and the last answers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import UserError
from rft_cluster.run.answers import read_answers
from rft_cluster.run.history import History, Row

WINDOW = 20  # steps that "lately" means: one step of a small run has too few groups to judge by
FEW = 5  # steps after which what is plain is said: a run with nothing to learn is ended then


def mean(rows: Sequence[Row], key: str) -> float | None:
    """The mean of a figure over the rows that have it; None with fewer than `FEW`."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if len(values) >= FEW else None


def lately(history: History, key: str, least: int = WINDOW) -> float | None:
    """The mean of the last `WINDOW` steps; None before there are `least`."""
    return mean(history.steps[-WINDOW:], key) if len(history.steps) >= least else None


def when(history: History) -> str:
    """The words for `lately`."""
    return f"in the last {min(WINDOW, len(history.steps))} steps"


def rise(history: History, key: str, since: int) -> float:
    """How much a figure rose: its mean lately less that of the `WINDOW` steps up to `since`."""
    before = mean([row for row in history.steps if row["step"] <= since][-WINDOW:], key)
    now = lately(history, key)
    return 0.0 if before is None or now is None else now - before


def whole(rows: Sequence[Row]) -> list[Row]:
    """The evaluations that have all figures: those of older versions lack some."""
    return [row for row in rows if {"accuracy_strict", "interval", "n"} <= row.keys()]


def evaluations(history: History, split: str) -> list[Row]:
    """The whole evaluations of a split, in order."""
    return [row for row in whole(history.evaluations) if row["split"] == split]


def last_answers(history: History) -> tuple[Row, list[Judged]]:
    """The last evaluation of a policy that has been trained, and its answers to images of classes that it was trained
    on; ({}, []) if there is none."""
    for row in reversed(history.evaluations):
        if row["step"]:
            try:
                judged = read_answers(history.folder, row["step"], row["split"])
            except UserError:  # damaged: the page says so
                return {}, []
            return row, [one for one in judged if one.label not in history.unseen]
    return {}, []


def equal_groups(history: History) -> tuple[int, int]:
    """The groups of the last `WINDOW` steps whose rewards are equal: (all right, all wrong), by the accuracy reward."""
    counts = Counter[bool]()
    for row in history.steps[-WINDOW:]:
        for group in history.rollouts(row["step"]):
            recorded = group.get("rewards")
            rewards = [one for one in recorded if _is_reward(one)] if isinstance(recorded, list) else []
            if len({reward["total"] for reward in rewards}) == 1 and "accuracy" in rewards[0]["parts"]:
                counts[rewards[0]["parts"]["accuracy"] == 1.0] += 1
    return counts[True], counts[False]


def _is_reward(reward: Any) -> bool:
    """Whether it is a reward with a total: the record may be damaged, or a stranger's."""
    known = isinstance(reward, dict) and isinstance(reward.get("parts"), dict)
    return known and isinstance(reward.get("total"), int | float)
