"""The completions of a run for the page's browser, in columns: a list for each figure, an entry for each completion.

Columns take a fifth of the bytes that objects would, and the page filters them without making an object.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.run.history import History, Row

MOST_COMPLETIONS = 50_000
MOST_BYTES = 60 * 10**6  # of rollouts/: the page holds about a tenth of them, compressed
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
    size = len(inner) / parts
    return [steps[0], *(inner[int((i + (i * NAMED) % 1) * size)] for i in range(parts)), steps[-1]]


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


class Columns:
    """Collects groups. `images` and `classes`: the numbers by which the page knows them."""

    def __init__(self, images: dict[str, int], classes: dict[str, int], reader: AnswerReader) -> None:
        self._images, self._classes, self._reader = images, classes, reader
        self.groups: dict[str, list[Any]] = {name: [] for name in ("step", "image", "label", "prompt", "start")}
        names = ("text", "total", "advantage", "tokens", "finish", "gap", "versions", "answer")
        self.completions: dict[str, list[Any]] = {name: [] for name in names}
        self.parts: dict[str, list[float | None]] = {}
        self.failures: dict[int, str] = {}

    def add(self, step: int, row: Row) -> None:
        texts, rewards = row["completions"], row.get("rewards") or []
        start, count = len(self.completions["text"]), len(texts)
        image = str(row.get("example_id"))
        number = self._images.setdefault(image, len(self._images))
        label = str(row.get("label"))
        of_group = (step, number, self._classes.setdefault(label, len(self._classes)), str(row.get("prompt_id")), start)
        for name, value in zip(self.groups, of_group, strict=True):
            self.groups[name].append(value)
        columns = {
            "text": [text if isinstance(text, str) else "" for text in texts],
            "total": [_number(reward.get("total")) for reward in rewards],
            "advantage": list(map(_number, row.get("advantages") or [])),
            "tokens": row.get("tokens") or [_tokens(spans) for spans in row.get("version_spans") or []],
            "finish": row.get("finish_reasons") or [],
            "gap": list(map(_number, row.get("logprob_gaps") or [])),
            "versions": [_versions(spans) for spans in row.get("version_spans") or []],
            "answer": [self._answer(text) for text in texts],
        }
        for name, values in columns.items():
            self.completions[name] += _filled(values, count)
        self._add_parts(_filled(rewards, count), start)

    def _answer(self, text: object) -> int:
        """The number of the class that a completion answers; -1 if it answers none."""
        label = self._reader.label(text) if isinstance(text, str) else None
        return -1 if label is None else self._classes[label]

    def _add_parts(self, rewards: Sequence[Row | None], start: int) -> None:
        for index, reward in enumerate(rewards, start):
            for name, value in (reward or {}).get("parts", {}).items():
                column = self.parts.setdefault(name, [])
                column += [None] * (index - len(column))
                column.append(_number(value))
            if failed := (reward or {}).get("failures"):
                self.failures[index] = "; ".join(f"{name}: {reason}" for name, reason in failed.items())

    def page(self) -> dict[str, Any]:
        """For the page; each column of a reward is as long as the others."""
        count = len(self.completions["text"])
        finishes = sorted({str(reason) for reason in self.completions["finish"] if reason is not None})
        codes = {reason: code for code, reason in enumerate(finishes)}
        finish = [None if reason is None else codes[str(reason)] for reason in self.completions["finish"]]
        return {
            "groups": {**self.groups, "start": [*self.groups["start"], count]},
            **{name: values for name, values in self.completions.items() if name == "text" or any_known(values)},
            "finish": finish if finishes else None,
            "finishes": finishes,
            "parts": {name: _filled(values, count) for name, values in self.parts.items()},
            "failures": self.failures,
        }


def completions(
    history: History, steps: Iterable[int], images: dict[str, int], classes: dict[str, int], reader: AnswerReader
) -> dict[str, Any]:
    """The columns of these steps. Those that no manifest names are added to
    `images` and `classes`."""
    columns = Columns(images, classes, reader)
    for step, row in _rows(history, steps):
        columns.add(step, row)
    return columns.page()


def _rows(history: History, steps: Iterable[int]) -> Iterator[tuple[int, Row]]:
    return ((step, row) for step in steps for row in history.rollouts(step) if isinstance(row["completions"], list))


def any_known(values: Sequence[Any]) -> bool:
    return any(value is not None for value in values)


def _filled(values: Sequence[Any], count: int) -> list[Any]:
    """`count` values: a record of an older version, or a damaged one, may have fewer or more."""
    return [*values[:count], *[None] * (count - len(values))]


def _number(value: object) -> float | None:
    """Four decimals: more would double the bytes."""
    if not isinstance(value, int | float) or not -1e12 < value < 1e12:  # also false for NaN
        return None
    return round(value, 4)


def _tokens(spans: Sequence[Sequence[int]]) -> int:
    return sum(tokens for _, tokens in spans)


def _versions(spans: Sequence[Sequence[int]]) -> int | str:
    """The version that wrote a completion, with numbers of tokens if they changed: "12 (40), 13 (24)"."""
    if len(spans) == 1:
        return spans[0][0]
    return ", ".join(f"{version} ({tokens})" for version, tokens in spans)
