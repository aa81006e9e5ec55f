"""A second look: the policy is asked again, with its own most probable answers as the only options (pure).

On open-vocabulary sets a 7B model gained 4 to 6 points by it without training (DiVE-k, ICLR 2026).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rft_cluster.classification.answers import Vote
from rft_cluster.classification.intervals import paired_difference, rate, rate_line
from rft_cluster.classification.probabilities import Answer, Scores, softmax

OPTIONS = 5  # unless --second-look says otherwise


@dataclass(frozen=True)
class Again:
    """Of one image: what it was asked about again, and the class that was answered. One option is not asked about.

    `scores`: of the options; None if the answer was written.
    `reasoning`: before the written answer, which is the first one where there was no second.
    """

    options: tuple[str, ...]
    label: str | None
    scores: Scores | None = None
    reasoning: str = ""


def most_probable(scores: Scores, classes: Sequence[str], count: int) -> list[str]:
    """The options of a policy that does not think, in the order of `classes`: the place says nothing."""
    best = np.argsort(-scores.joint, kind="stable")[:count]
    return [classes[index] for index in sorted(best)]


def most_voted(first: str | None, vote: Vote, classes: Sequence[str], count: int) -> list[str]:
    """The options of a policy that thinks, in the order of `classes`: its greedy answer, and those of its samples."""
    ranked = sorted(vote.counts, key=lambda label: -vote.counts[label])
    return first_of([*([first] if first else []), *ranked], classes, count)


def first_of(ranked: Iterable[str], classes: Sequence[str], count: int) -> list[str]:
    """The first `count` different ones of `ranked`, in the order of `classes`."""
    kept = list(dict.fromkeys(ranked))[:count]
    return [label for label in classes if label in kept]


def looked_again(first: Answer, again: Again, temperature: float) -> Answer:
    """The probabilities after a second look: those of the options are divided anew, the others stay."""
    assert again.scores is not None, "the second answer was written"
    whole = sum(first.probabilities[label] for label in again.options)
    divided = dict(zip(again.options, whole * softmax(again.scores.joint, temperature), strict=True))
    found = {label: float(divided.get(label, share)) for label, share in first.probabilities.items()}
    return Answer(dict(sorted(found.items(), key=lambda item: -item[1])), first.named)


def second_look_report(again: Sequence[Again], right: Sequence[bool], labels: Sequence[str]) -> dict[str, Any]:
    """For `evaluation.json`: of images that were looked at again.

    `right`: whether their greedy answers are. `labels`: what they show.
    """
    hits = [one.label == label for one, label in zip(again, labels, strict=True)]
    return {
        "asked": sum(len(one.options) > 1 for one in again),
        "strict": rate(hits),
        "minus_greedy": paired_difference(right, hits),
        "in_options": rate([label in one.options for one, label in zip(again, labels, strict=True)]),
    }


def second_look_lines(figures: Mapping[str, Any]) -> list[str]:
    """For people."""
    less = figures["minus_greedy"]
    ends = " to ".join(f"{100 * end:+.1f}" for end in less["interval"])
    return [
        f"{rate_line('second look', figures['strict'])}   "
        f"({100 * less['difference']:+.1f} points on greedy, {ends}; {figures['asked']} images asked about again, "
        f"the right class among the options for {100 * figures['in_options']['rate']:.1f} %)"
    ]
