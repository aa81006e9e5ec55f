"""Accuracy on the classes that training showed, and on those that it did not, apart (pure).

    apart(judged, ("nine",)) -> {"seen": {"rate": 0.85, ...}, "unseen": {"rate": 0.1, ...}}

A policy may name a class that it was never trained on, because its language model knows the word. A classifier fitted
to the training images cannot: baselines are measured, and verdicts given, on the images of seen classes alone.
"""

from collections.abc import Collection, Sequence
from typing import Any

from rft_cluster.classification.intervals import paired_difference, rate
from rft_cluster.classification.report import Judged

NOTE = "baselines and verdict are about the images of seen classes: no baseline can know the others"


def parted(judged: Sequence[Judged], unseen: Collection[str]) -> dict[str, list[bool]]:
    """Whether the strict answers are right, of images of "seen" and of "unseen" classes, in order."""
    return {
        "seen": [one.strict for one in judged if one.label not in unseen],
        "unseen": [one.strict for one in judged if one.label in unseen],
    }


def apart(judged: Sequence[Judged], unseen: Collection[str]) -> dict[str, dict[str, Any]]:
    """The rates (see `rate`) of `parted`; empty without images of unseen classes."""
    flags = parted(judged, unseen)
    return {name: rate(own) for name, own in flags.items()} if all(flags.values()) else {}


def apart_lines(before: Sequence[Judged], after: Sequence[Judged], unseen: Collection[str]) -> list[str]:
    """For people: the rates after training, and the differences from before, image by image. `before`: the same images,
    or empty if unknown."""
    rates, ours = apart(after, unseen), parted(after, unseen)
    former = parted(before, unseen)
    lines = []
    for name, own in rates.items():
        low, high = (100 * end for end in own["interval"])
        line = f"{name} classes: test accuracy {100 * own['rate']:.1f} % ({low:.1f} to {high:.1f}, {own['n']} images)"
        if before:
            less = paired_difference(former[name], ours[name])
            low, high = (100 * end for end in less["interval"])
            line += f", {100 * less['difference']:+.1f} points ({low:+.1f} to {high:+.1f}) over the untrained model"
        lines.append(line)
    return [*lines, NOTE] if lines else []
