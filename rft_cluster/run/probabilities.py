"""P(class | image) of a run's policies: scored after what they wrote, and its temperature fitted at the end of the run.

calibration.json    {"models": {"model": {"steps", "temperature", "images", "unfitted": {...}, "fitted": {...}}}}
                    with figures of the validation images that the temperature was fitted on, or {"skipped": why},
                    with "never" if no resumed run can change that
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from rft_cluster.classification.calibration import (
    calibration_figures,
    calibration_line,
    probability_report,
    short_figures,
)
from rft_cluster.classification.card import CARD_FILE, Calibration
from rft_cluster.classification.intervals import paired_difference
from rft_cluster.classification.probabilities import (
    FEWEST,
    OPEN,
    Score,
    Scores,
    answer_of,
    at_temperature,
    before_answer,
    fit_temperature,
    score_classes,
)
from rft_cluster.classification.second_look import Again, looked_again, most_probable
from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.common.files import FORMAT, write_json
from rft_cluster.common.progress import with_progress
from rft_cluster.config import Config
from rft_cluster.messages import Example, Group
from rft_cluster.prompts import asks_for_thinking, narrowed
from rft_cluster.run.answers import read_answers
from rft_cluster.run.saving import BEST, CALIBRATION_FILE, MODEL, NEVER, exported
from rft_cluster.run.second_look import Ask
from rft_cluster.run.task import Task

GREY = 224  # pixels of a side

OpenScorers = Callable[[Config], AbstractContextManager[Callable[[str], Score]]]
"""`cluster.class_scorer.scorers`: folder of a model -> its `Score`, until the next one is asked for."""


class NeverCalibrated(UserError):
    """What a run lacks for its calibration, and cannot get when it is resumed."""


@dataclass(frozen=True)
class Scored:
    """What a policy says of the classes: of each image after its greedy answer's reasoning; if asked for, after each of
    the votes' (never without reasoning); and of a grey image (None with reasoning, which it has none of). `again`:
    without reasoning, if asked for, of the options at a second look."""

    after_greedy: list[Scores | None]
    after_votes: list[list[Scores | None]]
    grey: Scores | None
    again: list[Again]


def score_groups(
    config: Config,
    task: Task,
    model_path: str,
    greedy: Sequence[Group],
    votes: Sequence[Group],
    opened: OpenScorers,
    options: int = 0,
) -> Scored:
    """Score all classes for each image, after what was written about it. Prints how far it is.

    `votes`: of the same images, to score the classes after each vote's reasoning, too; empty: do not.
    `options`: of a second look, 0 for none. A policy that thinks takes its own in writing (`run/second_look.py`).
    """
    classes, aliases, thinks = task.dataset.classes, task.dataset.aliases, asks_for_thinking(task.text)
    after, again = list[list[Scores | None]](), list[Again]()
    with opened(config) as scorer_of:
        score = scorer_of(model_path)
        for number, first in enumerate(with_progress(greedy, "images whose classes are scored")):
            image = task.dataset.image(first.prompt.example)
            written = [first, *votes[number : number + 1]]
            texts = [completion.text for group in written for completion in group.completions]
            befores = [before_answer(text) for text in texts] if thinks else [OPEN]
            after.append(score_classes(score, image, task.text, befores, classes, aliases))
            if options and not thinks:
                ask = partial(narrowed, task.question, config.prompt.subject)
                again.append(score_again(score, image, ask, classes, aliases, after[-1], options))
        grey = None if thinks else score_classes(score, _grey(), task.text, [OPEN], classes, aliases)[0]
    return Scored([own[0] for own in after], [own[1:] for own in after] if thinks and votes else [], grey, again)


def score_again(
    score: Score,
    image: bytes,
    ask: Ask,
    classes: Sequence[str],
    aliases: Mapping[str, Sequence[str]],
    scores: Sequence[Scores | None],
    count: int,
) -> Again:
    """A second look by a policy that does not think: the `count` most probable classes by its one `scores`, scored
    again as the only ones listed."""
    (first,) = scores
    assert first is not None, "without reasoning nothing is out of format"
    options = most_probable(first, classes, count)
    (second,) = score_classes(score, image, ask(options), [OPEN], options, aliases)
    assert second is not None
    return Again(tuple(options), options[int(second.joint.argmax())], second)


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
    report = probability_report(scored.after_greedy, scored.after_votes, right, len(classes), temperature, scored.grey)
    answers = [answer_of([scores], classes, temperature or 1.0) for scores in scored.after_greedy]
    hits = [answer.label == example.label for answer, example in zip(answers, examples, strict=True)]
    rows = [
        row | {"most_probable": answer.label, "probability": answer.probability}
        for row, answer in zip(figures["predictions"], answers, strict=True)
    ]
    if scored.again:
        looked = [
            looked_again(answer, one, temperature or 1.0) for answer, one in zip(answers, scored.again, strict=True)
        ]
        report["second_look"] = short_figures(
            np.array([[one.probabilities[c] for c in classes] for one in looked]), right
        )
    report["fitted_on"] = calibration.images if calibration else None
    report["minus_greedy"] = paired_difference([row["strict"] for row in rows], hits)
    return {**figures, "probabilities": report, "predictions": rows}


def calibrate(config: Config, task: Task, opened: OpenScorers) -> list[str]:
    """Fit the temperature of each exported model on the validation images, and write it into the model's card.

    Returns lines for people. A finished run does not fail for it: what keeps it from being fitted is recorded.
    """
    examples, run = task.dataset.validation, config.run_folder
    head = {"format": FORMAT, "steps": config.schedule.steps}
    cards = {name: card for name in (MODEL, BEST) if (card := exported(run / name))}
    found: dict[int, dict[str, Any]] = {}  # by step: the last policy may also be the best
    try:
        if len(examples) < FEWEST:
            raise NeverCalibrated(f"there are {len(examples)} validation images, and that needs {FEWEST}")
        befores = {card.steps: _befores(config, task, card.steps) for card in cards.values()}
        with opened(config) as scorer_of:
            for name, card in cards.items():
                if card.steps not in found:
                    found[card.steps] = _fitted(task, scorer_of(str(run / name)), befores[card.steps])
                own = Calibration(**{key: found[card.steps][key] for key in ("temperature", "images")})
                write_json(run / name / CARD_FILE, card.model_copy(update={"calibration": own}).record())
    except (UserError, ClusterError) as error:
        never = {NEVER: True} if isinstance(error, NeverCalibrated) else {}
        write_json(run / CALIBRATION_FILE, head | {"skipped": str(error)} | never)
        return [f"probabilities are not calibrated: {error}"]
    models = {name: {"steps": card.steps, **found[card.steps]} for name, card in cards.items()}
    write_json(run / CALIBRATION_FILE, head | {"models": models})
    return [calibration_line(name, models[name]) for name in models]


def _fitted(task: Task, score: Score, befores: Sequence[str | None]) -> dict[str, Any]:
    """The record of one model. `befores`: what comes before the answer to each validation image.

    The temperature is fitted on those that have an answer in the format: of the others nothing is known.
    """
    examples, classes, aliases = task.dataset.validation, task.dataset.classes, task.dataset.aliases
    scores = [
        score_classes(score, task.dataset.image(example), task.text, [before], classes, aliases)
        for example, before in zip(with_progress(examples, "validation images scored"), befores, strict=True)
    ]
    right, at = labels_of(examples, classes), partial(at_temperature, scores, len(classes))
    said = np.array([before is not None for before in befores])
    temperature = fit_temperature(lambda one: at(one)[said], right[said])
    return {"temperature": temperature, "images": int(said.sum()), "unfitted": calibration_figures(at(1.0), right),
            "fitted": calibration_figures(at(temperature), right)}  # fmt: skip


def _befores(config: Config, task: Task, steps: int) -> list[str | None]:
    """What comes before the answers to the validation images: with reasoning, that of the greedy answers after `steps`
    steps, as they are recorded."""
    examples = task.dataset.validation
    if not asks_for_thinking(task.text):
        return [OPEN] * len(examples)
    texts = {one.example_id: one.text for one in read_answers(config.run_folder, steps, "validation")}
    if missing := [example.example_id for example in examples if example.example_id not in texts]:
        raise NeverCalibrated(
            f"no answer to {missing[0]} after step {steps} is recorded, whose reasoning comes before the classes: set "
            f"schedule.evaluate_every in the next run"
        )
    befores = [before_answer(texts[example.example_id]) for example in examples]
    if (said := sum(before is not None for before in befores)) < FEWEST:
        raise NeverCalibrated(
            f"after step {steps} {said} of the {len(examples)} answers to validation images have the format, and that "
            f"needs {FEWEST}"
        )
    return befores


def labels_of(examples: Sequence[Example], classes: Sequence[str]) -> np.ndarray:
    """The indices of the examples' labels [n]."""
    numbers = {label: number for number, label in enumerate(classes)}
    return np.array([numbers[example.label] for example in examples])


def _grey() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (GREY, GREY), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()
