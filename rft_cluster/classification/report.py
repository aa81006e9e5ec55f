"""The report of an evaluation: each image's greedy answer, and a vote over several samples (pure).

Strict accuracy follows the `accuracy` reward. Lenient accuracy follows the published containment rule, for comparison
with published figures, with one exception: an empty answer is wrong. By the published rule it is right for every class,
so a policy that writes nothing would look perfect.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rft_cluster.classification.answers import AnswerReader, Vote
from rft_cluster.classification.intervals import paired_difference, rate, wilson
from rft_cluster.common.errors import UserError
from rft_cluster.common.labels import normalise_label
from rft_cluster.common.text import printable
from rft_cluster.data.dataset import NO_CLASS
from rft_cluster.messages import Group
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.containment import containment_reward, published_answer
from rft_cluster.rewards.format import format_reward

FAILURES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rates on the `n` images of a split, 0 to 1. `interval`: 95 % interval of `accuracy_strict`."""

    step: int
    split: str
    accuracy_strict: float
    accuracy_lenient: float
    format_rate: float
    n: int
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Judged:
    """One image's greedy answer and its judgement. `predicted` is None if the answer is no class."""

    example_id: str
    label: str
    text: str
    predicted: str | None
    strict: bool
    lenient: bool
    formatted: bool


def judge(group: Group, reader: AnswerReader) -> Judged:
    """Judge a group's first completion."""
    prompt, text = group.prompt, group.completions[0].text
    return Judged(prompt.example_id, prompt.label, text, reader.label(text), *_judgement(group))


def _judgement(group: Group) -> tuple[bool, bool, bool]:
    """Whether a group's first completion is right strictly, right leniently, and in the format."""
    prompt, completion = group.prompt, group.completions[0]
    lenient = containment_reward(prompt, completion) == 1.0 and bool(normalise_label(published_answer(completion.text)))
    return accuracy_reward(prompt, completion) == 1.0, lenient, format_reward(prompt, completion) == 1.0


def summarise(step: int, split: str, groups: Sequence[Group]) -> Evaluation:
    """Accuracy and format rate of each group's first completion.

    Raises:
        ValueError: there are no groups.
    """
    if not groups:
        raise ValueError(f"nothing to evaluate: no groups for split {split!r} at step {step}")
    n = len(groups)
    right, lenient, formatted = map(sum, zip(*map(_judgement, groups), strict=True))
    return Evaluation(step, split, right / n, lenient / n, formatted / n, n, wilson(right, n))


def report(
    judged: Sequence[Judged], votes: Sequence[Vote], classes: Sequence[str], pixels: Mapping[str, str]
) -> dict[str, Any]:
    """The content of `evaluation.json`.

    `votes`: one for each of `judged`. `pixels`: the images' digests (`pixel_digest`) by example id.
    """
    strict = [image.strict for image in judged]
    voted = [vote.label == image.label for image, vote in zip(judged, votes, strict=True)]
    counts = _counts(judged)
    failures = [image for image in judged if not image.formatted]
    return {
        "images": len(judged),
        "greedy": {
            "strict": rate(strict),
            "lenient": rate([image.lenient for image in judged]),
            "format": rate([image.formatted for image in judged]),
        },
        "vote": {"strict": rate(voted)},
        "vote_minus_greedy": paired_difference(strict, voted),
        "classes": [_class_row(label, judged, counts, [*classes, NO_CLASS]) for label in classes],
        "confusion": confusion(judged, classes),
        "format_failures": {
            "count": len(failures),
            "examples": [{"id": image.example_id, "text": image.text} for image in failures[:FAILURES_SHOWN]],
        },
        "predictions": [
            {
                "id": image.example_id,
                "pixels": pixels[image.example_id],
                "label": image.label,
                "predicted": image.predicted,
                "strict": image.strict,
                "lenient": image.lenient,
                "format": image.formatted,
                "voted": vote.label,
                "share": vote.share,
                "text": image.text,
            }
            for image, vote in zip(judged, votes, strict=True)
        ],
    }


def _class_row(
    label: str, judged: Sequence[Judged], counts: Mapping[tuple[str, str], int], columns: Sequence[str]
) -> dict[str, Any]:
    own = [image.strict for image in judged if image.label == label]
    wrong = {column: counts[label, column] for column in columns if column != label and counts[label, column]}
    return {
        "label": label,
        **(rate(own) if own else {"right": 0, "n": 0, "rate": None, "interval": None}),
        "predicted_in_all": sum(image.predicted == label for image in judged),
        "taken_for": dict(sorted(wrong.items(), key=lambda item: -item[1])),
    }


def confusion(judged: Sequence[Judged], classes: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix: {"rows": labels, "columns": answers, "counts": [labels][answers]}."""
    found, columns = _counts(judged), [*classes, NO_CLASS]
    counts = [[found[label, answer] for answer in columns] for label in classes]
    return {"rows": list(classes), "columns": columns, "counts": counts}


def _counts(judged: Sequence[Judged]) -> Counter[tuple[str, str]]:
    """The number of images by (label, answer)."""
    return Counter((image.label, image.predicted or NO_CLASS) for image in judged)


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two reports image by image: strict greedy accuracy, and votes (see `paired_difference`).

    Raises:
        UserError: the images or labels differ (see `knows_pixels` for older reports).
    """
    ours, theirs = ({row["id"]: row for row in side["predictions"]} for side in (first, second))
    if ours.keys() != theirs.keys():
        shared = len(ours.keys() & theirs.keys())
        raise UserError(
            f"the evaluations are not of the same images: {len(ours)} and {len(theirs)}, {shared} of them in both. "
            f"Evaluate both with the same data settings and seed"
        )
    pairs = [(ours[i], theirs[i]) for i in ours]
    _refuse("labels", "another label", [(a["id"], a["label"], b["label"]) for a, b in pairs])
    if knows_pixels(first) and knows_pixels(second):
        _refuse("pictures", "other pixels", [(a["id"], a["pixels"], b["pixels"]) for a, b in pairs])
    return {
        "greedy": paired_difference([a["strict"] for a, _ in pairs], [b["strict"] for _, b in pairs]),
        "vote": paired_difference(
            [a["voted"] == a["label"] for a, _ in pairs], [b["voted"] == b["label"] for _, b in pairs]
        ),
    }


def knows_pixels(report: Mapping[str, Any]) -> bool:
    """Return True if a report has the digests of its images; reports of earlier versions have only ids."""
    return all("pixels" in row for row in report["predictions"])


def _refuse(what: str, how: str, pairs: Sequence[tuple[str, str, str]]) -> None:
    differ = [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]
    if differ:
        name, ours, theirs = differ[0]
        raise UserError(
            f"the evaluations are of the same names, but not of the same {what}: {len(differ)} of {len(pairs)} have "
            f"{how} in the second (first {printable(name)}: {printable(ours)[:60]}, then {printable(theirs)[:60]}). "
            f"Evaluate both on the same data"
        )
