"""P(class | image) of a run's policies: scored after what they wrote, and its temperature fitted at the end."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rft_cluster.classification.calibration import probability_report
from rft_cluster.classification.card import Calibration
from rft_cluster.classification.intervals import paired_difference
from rft_cluster.classification.probabilities import OPEN, Score, Scores, answer_of, before_answer, score_classes
from rft_cluster.common.progress import with_progress
from rft_cluster.config import Config
from rft_cluster.messages import Example, Group
from rft_cluster.prompts import asks_for_thinking
from rft_cluster.run.task import Task

GREY = 224  # pixels of a side

OpenScorer = Callable[[Config, str], AbstractContextManager[Score]]
"""(configuration, folder of a model) -> its `Score`, e.g. `cluster.class_scorer.scorer_of`."""


@dataclass(frozen=True)
class Scored:
    """What a policy says of the classes: of each image after its greedy answer's reasoning, and after each of the
    votes' (none without reasoning); and of a grey image (None with reasoning, which it has none of)."""

    after_greedy: list[Scores | None]
    after_votes: list[list[Scores | None]]
    grey: Scores | None


def score_groups(
    config: Config, task: Task, model_path: str, greedy: Sequence[Group], votes: Sequence[Group], opened: OpenScorer
) -> Scored:
    """Score all classes for each image, after what was written about it. Prints how far it is."""
    classes, thinks = task.dataset.classes, asks_for_thinking(task.text)
    with opened(config, model_path) as score:

        def scored(groups: Sequence[Group], image: bytes) -> list[Scores | None]:
            texts = [completion.text for group in groups for completion in group.completions]
            befores = [before_answer(text) for text in texts] if thinks else [OPEN]
            return score_classes(score, image, task.text, befores, classes)

        grey = None if thinks else scored([], _grey())[0]
        pairs = list(zip(greedy, votes, strict=True))
        found = [
            scored(pair if thinks else [], task.dataset.image(pair[0].prompt.example))
            for pair in with_progress(pairs, "images whose classes are scored")
        ]
    return Scored([own[0] for own in found], [own[1:] for own in found] if thinks else [], grey)


def with_probabilities(
    figures: Mapping[str, Any],
    scored: Scored,
    examples: Sequence[Example],
    classes: Sequence[str],
    calibration: Calibration | None,
) -> dict[str, Any]:
    """An evaluation's figures, with those of the probabilities. Each prediction also gets the most probable class and
    its probability."""
    right, temperature = labels_of(examples, classes), calibration.temperature if calibration else None
    report = probability_report(scored.after_greedy, scored.after_votes, right, temperature, scored.grey)
    answers = [answer_of([scores], classes, temperature or 1.0) for scores in scored.after_greedy]
    hits = [answer.label == example.label for answer, example in zip(answers, examples, strict=True)]
    rows = [
        row | {"most_probable": answer.label, "probability": answer.probability}
        for row, answer in zip(figures["predictions"], answers, strict=True)
    ]
    report["fitted_on"] = calibration.images if calibration else None
    report["minus_greedy"] = paired_difference([row["strict"] for row in rows], hits)
    return {**figures, "probabilities": report, "predictions": rows}


def labels_of(examples: Sequence[Example], classes: Sequence[str]) -> np.ndarray:
    """The indices of the examples' labels [n]."""
    numbers = {label: number for number, label in enumerate(classes)}
    return np.array([numbers[example.label] for example in examples])


def _grey() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (GREY, GREY), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()
