"""What `predict` says about an image: for people, for programs and for spreadsheets (pure)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rft_cluster.classification.answers import Vote
from rft_cluster.classification.probabilities import Answer
from rft_cluster.classification.second_look import Again
from rft_cluster.common.text import csv_line, percent, printable
from rft_cluster.data.dataset import NO_CLASS, UNSURE

REASONING_SHOWN = 200
TOP = 5
COUNTED = 20  # classes listed in the summary
COLUMNS = ("file", "label", "share", "reasoning")  # of a table, of written answers
COLUMNS_OF_P = ("file", "label", "probability", "second", "reasoning")  # of the most probable classes


@dataclass(frozen=True)
class Prediction:
    """Of one image.

    `vote`: of what the policy wrote; None if it wrote nothing.
    `answer`: the probabilities of the classes; None if they were not asked for.
    `votes`: number of samples; None of one greedy answer.
    `unsure_below`: the least probability of an answer.
    `calibrated`: whether the probabilities are at a fitted temperature.
    `again`: what came of a second look; `answer`, if there is one, has it.
    """

    file: str
    vote: Vote | None
    answer: Answer | None = None
    votes: int | None = None
    unsure_below: float = 0.0
    calibrated: bool = False
    again: Again | None = None

    @property
    def unsure(self) -> bool:
        return self.answer is not None and self.answer.probability < self.unsure_below

    @property
    def label(self) -> str:
        """For people."""
        if self.unsure:
            return UNSURE
        return NO_CLASS if self.chosen is None else printable(self.chosen)

    @property
    def chosen(self) -> str | None:
        """The class of the answer, sure or not; None if the answer is none."""
        if self.answer:
            return self.answer.label
        return self.again.label if self.again else self.vote.label if self.vote else None

    @property
    def share(self) -> float:
        """That of the chosen class among the samples, 0 to 1."""
        return self.vote.share_of(self.chosen) if self.vote else 0.0

    @property
    def reasoning(self) -> str:
        """That of the chosen class."""
        if self.again and self.answer is None:
            return self.again.reasoning
        return self.vote.reasoning if self.vote else ""


def text_line(one: Prediction) -> str:
    """File, label, how, and the most probable classes or the reasoning, separated by tabs."""
    shown = [printable(one.reasoning)[:REASONING_SHOWN]] if one.vote else []
    if one.answer:
        top = ", ".join(f"{printable(name)} {percent(share)}" for name, share in one.answer.top(TOP).items())
        how, shown = percent(one.answer.probability), [top, *filter(None, shown)]
    else:
        share = percent(one.vote.share, digits=0) if one.vote and one.votes else "greedy"
        how = f"second look at {len(one.again.options)}" if one.again else share
    return "\t".join([printable(one.file), one.label, how, *shown])


def json_line(one: Prediction) -> str:
    record: dict[str, Any] = {"file": one.file}
    if one.answer:
        record |= {**one.answer.record(), "unsure": one.unsure, "calibrated": one.calibrated}
        record |= {"reasoning": one.reasoning, "counts": one.vote.counts} if one.vote else {}
    elif one.vote:
        record |= asdict(one.vote)
    if one.again:
        record["options"] = list(one.again.options)
        if one.answer is None:
            record |= {"label": one.chosen, "share": one.share, "reasoning": one.reasoning}
    return json.dumps(record, ensure_ascii=False)


def table_line(one: Prediction) -> str:
    """A row of `COLUMNS`, or of `COLUMNS_OF_P`, without the end of the line."""
    reasoning = printable(one.reasoning)
    if one.answer:
        second = list(one.answer.probabilities)[1]
        own = [UNSURE if one.unsure else one.chosen or "", round(one.answer.probability, 4), second, reasoning]
    else:
        own = [one.chosen or "", round(one.share, 4), reasoning]
    return csv_line([one.file, *own]).rstrip("\n")


def summary_line(labels: Mapping[str, int], unreadable: int) -> str:
    """`81 images: 41 bag, 38 shoe, 2 (no class)`, most frequent first, then the number of unreadable files."""
    ranked = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    counts = [f"{count} {label}" for label, count in ranked[:COUNTED]]
    rest = ranked[COUNTED:]
    if rest:
        counts.append(f"{sum(count for _, count in rest)} of {len(rest)} other classes")
    failed = [f"{unreadable} not classified"] if unreadable else []
    total = sum(labels.values())
    return "; ".join([f"{total} images: {', '.join(counts)}" if total else "0 images", *failed])
