"""The completions of a run for the page's browser, in columns: a list for each figure, an entry for each completion.

Columns take a fifth of the bytes that objects would, and the page filters them without making an object.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.run.figures import rounded
from rft_cluster.run.history import History, Row

MOST_COMPLETIONS = 50_000
MOST_BYTES = 60 * 10**6  # of rollouts/: the page holds about a tenth of them, compressed
DIGITS = 4  # of a completion's figures
NAMED = 0.6180339887  # the golden ratio's fraction: its multiples fall evenly, and in step with no epoch


def chosen_steps(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, ascending: the first, the last, and others spread over the run.

    Equal distances would choose the same images of every epoch. So from each of as many equal parts one step is taken,
    at a place that moves on by the golden ratio.
    """
    if len(steps) <= most:
        return list(steps)
    if most < 3:
        return [*steps[:1], *steps[-1:]][-max(1, most) :]
    inner, parts = steps[1:-1], most - 2
    ends = [i * len(inner) // parts for i in range(parts + 1)]
    places = [begin + int((i * NAMED) % 1 * (end - begin)) for i, (begin, end) in enumerate(pairwise(ends))]
    return [steps[0], *(inner[place] for place in places), steps[-1]]


def steps_that_fit(history: History, most: int = MOST_COMPLETIONS, most_bytes: int = MOST_BYTES) -> list[int]:
    """The steps whose completions the page shows: all, or as many as have `most` completions and `most_bytes`."""
    steps = [step for step in history.recorded if step <= max(1, history.last)]
    if not steps:
        return []
    first = history.rollouts(steps[0])
    completions = sum(len(row["completions"]) for row in first) or 1
    sizes = sum(_size(history.folder / "rollouts" / f"step-{step:06d}.jsonl") for step in steps) or 1
    return chosen_steps(steps, max(1, min(most // completions, int(len(steps) * most_bytes / sizes))))


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


class Rewarded(BaseModel):
    total: float | None = None
    parts: dict[str, float] = {}
    failures: dict[str, str] = {}

    @property
    def is_scored(self) -> bool:
        """False for a target of SFT."""
        return self.total is None or bool(self.parts)


class Recorded(BaseModel):
    """A group in `rollouts/`. Older versions wrote fewer keys (see `run/rollouts.py`)."""

    prompt_id: str = ""
    example_id: str = ""
    label: str = ""
    completions: list[str]
    version_spans: list[list[tuple[int, int]]] = []
    rewards: list[Rewarded] = []
    advantages: list[float | None] = []
    tokens: list[int] = []
    finish_reasons: list[str] = []
    logprob_gaps: list[float | None] = []
    why: list[str] = []


class Columns:
    """Collects groups. `images` and `classes`: the numbers by which the page knows them. `damaged`: groups left out."""

    def __init__(self, images: dict[str, int], classes: dict[str, int], reader: AnswerReader) -> None:
        self._images, self._classes, self._reader = images, classes, reader
        self.groups: dict[str, list[Any]] = {name: [] for name in ("step", "image", "label", "prompt", "start")}
        names = ("text", "total", "advantage", "tokens", "finish", "gap", "versions", "answer", "why")
        self.completions: dict[str, list[Any]] = {name: [] for name in names}
        self.parts: dict[str, list[float | None]] = {}
        self.failures: dict[int, str] = {}
        self.damaged = 0

    def add(self, step: int, row: Row) -> None:
        try:
            group = Recorded.model_validate(row)
        except ValidationError:
            self.damaged += 1
            return
        start, count = len(self.completions["text"]), len(group.completions)
        image = self._images.setdefault(group.example_id, len(self._images))
        label = self._classes.setdefault(group.label, len(self._classes))
        for name, value in zip(self.groups, (step, image, label, group.prompt_id, start), strict=True):
            self.groups[name].append(value)
        columns: dict[str, Sequence[Any]] = {
            "text": group.completions,
            "total": [rounded(reward.total, DIGITS) if reward.is_scored else None for reward in group.rewards],
            "advantage": [rounded(value, DIGITS) for value in group.advantages],
            "tokens": group.tokens or [sum(tokens for _, tokens in spans) for spans in group.version_spans],
            "finish": group.finish_reasons,
            "gap": [rounded(value, DIGITS) for value in group.logprob_gaps],
            "versions": list(map(_versions, group.version_spans)),
            "answer": list(map(self._answer, group.completions)),
            "why": group.why,
        }
        for name, values in columns.items():
            self.completions[name] += _filled(values, count)
        for index, reward in enumerate(group.rewards[:count], start):
            self._add_parts(index, reward)

    def _answer(self, text: str) -> int:
        """The number of the class that a completion answers; -1 if it answers none."""
        label = self._reader.label(text)
        return -1 if label is None else self._classes[label]

    def _add_parts(self, index: int, reward: Rewarded) -> None:
        for name, value in reward.parts.items():
            column = self.parts.setdefault(name, [])
            column += [None] * (index - len(column))
            column.append(rounded(value, DIGITS))
        if reward.failures:
            self.failures[index] = "; ".join(f"{name}: {reason}" for name, reason in reward.failures.items())

    def page(self) -> dict[str, Any]:
        """For the page; each column of a reward is as long as the others."""
        count = len(self.completions["text"])
        finishes = sorted({reason for reason in self.completions["finish"] if reason is not None})
        codes = {reason: code for code, reason in enumerate(finishes)}
        finish = [None if reason is None else codes[reason] for reason in self.completions["finish"]]
        return {
            "groups": {**self.groups, "start": [*self.groups["start"], count]},
            **{name: values for name, values in self.completions.items() if name == "text" or _any_known(values)},
            "finish": finish if finishes else None,
            "finishes": finishes,
            "parts": {name: _filled(values, count) for name, values in self.parts.items()},
            "failures": self.failures,
        }


def read_columns(
    history: History, steps: Iterable[int], images: dict[str, int], classes: dict[str, int], reader: AnswerReader
) -> Columns:
    """The completions of these steps. Those that no manifest names are added to `images` and `classes`."""
    columns = Columns(images, classes, reader)
    for step in steps:
        for row in history.rollouts(step):
            columns.add(step, row)
    return columns


def _any_known(values: Sequence[Any]) -> bool:
    return any(value is not None for value in values)


def _filled(values: Sequence[Any], count: int) -> list[Any]:
    """`count` values: a record of an older version, or a damaged one, may have fewer or more."""
    return [*values[:count], *[None] * (count - len(values))]


def _versions(spans: Sequence[tuple[int, int]]) -> int | str:
    """The version that wrote a completion, with numbers of tokens if they changed: "12 (40), 13 (24)"."""
    if len(spans) == 1:
        return spans[0][0]
    return ", ".join(f"{version} ({tokens})" for version, tokens in spans)
