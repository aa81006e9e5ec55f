"""What is scored for an evaluation, and what comes of it. The scores themselves are tested with a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from rft_cluster.classification.card import Calibration
from rft_cluster.config import Config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.messages import Completion, Group
from rft_cluster.prompts import make_prompts, make_question
from rft_cluster.run.probabilities import Scored, score_groups, with_probabilities
from rft_cluster.run.task import Task
from tests.unit.run.begun import config, picture

CLASSES = ["rose", "tulip"]
TEST = [LabelledImage("a", picture("red"), "rose"), LabelledImage("b", picture("yellow"), "tulip")]
DATASET = FewShotDataset.of("photos", CLASSES, [], [], TEST, [])


def task(template: str) -> Task:
    return Task(DATASET, make_question(template, "flower", CLASSES))


def groups(task: Task, *texts: str) -> list[Group]:
    prompts = make_prompts(DATASET.test, task.text, "test", 0, 0)
    return [Group(prompt, [1], [Completion([1], [0.0], text, "stop", 0) for text in texts]) for prompt in prompts]


class Policy:
    """In place of the actor: it says rose, more so after a reasoning that names it."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, str, str]] = []
        self.opened: list[str] = []

    @contextmanager
    def __call__(self, config: Config, model_path: str) -> Iterator["Policy"]:
        self.opened.append(model_path)
        yield self.score

    def score(self, image: bytes, question: str, before: str, answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((image, question, before))
        rose = 0.9 if "rose" in before else 0.6
        return np.log([rose, 1 - rose, 1e-9, 1e-9]), np.full(4, 3)


def scored(template: str, tmp_path, votes: Sequence[str]) -> tuple[Scored, Policy]:
    asked, policy = task(template), Policy()
    greedy = groups(asked, "<think>a rose</think><answer>tulip</answer>")
    return score_groups(config(tmp_path), asked, "model", greedy, groups(asked, *votes), policy), policy


def test_without_reasoning_every_image_is_scored_once_and_so_is_a_grey_one(tmp_path):
    found, policy = scored("closed", tmp_path, ["<answer>rose</answer>"] * 3)
    assert policy.opened == ["model"]
    grey, *images = policy.asked
    assert [image for image, _, _ in images] == [picture("red"), picture("yellow")] and grey[0] not in images
    assert {before for _, _, before in policy.asked} == {"<answer>"}
    assert {question for _, question, _ in policy.asked} == {task("closed").text}
    assert found.after_votes == [] and found.grey is not None and len(found.after_greedy) == 2


def test_with_reasoning_each_is_scored_after_it(tmp_path):
    votes = ["<think>a rose</think><answer>rose</answer>", "<think>red</think><answer>rose</answer>", "none"]
    found, policy = scored("think_answer", tmp_path, votes)
    befores = {"<think>a rose</think><answer>", "<think>red</think><answer>"}
    for image in (picture("red"), picture("yellow")):
        own = [before for seen, _, before in policy.asked if seen == image]
        assert sorted(own) == sorted(befores), "an equal reasoning is scored once"
    assert found.grey is None
    for greedy, (same, other, none) in zip(found.after_greedy, found.after_votes, strict=True):
        assert greedy is same and none is None
        assert other.named == pytest.approx(1.0)


@pytest.mark.parametrize("calibration", [None, Calibration(temperature=2.0, images=60)])
def test_an_evaluation_gets_the_probabilities(tmp_path, calibration):
    found, _ = scored("closed", tmp_path, ["<answer>rose</answer>"])
    rows = [{"id": "a", "strict": True}, {"id": "b", "strict": False}]
    figures = with_probabilities({"images": 2, "predictions": rows}, found, DATASET.test, CLASSES, calibration)
    probability = 0.6 if calibration is None else 0.6**0.5 / (0.6**0.5 + 0.4**0.5)
    assert [row["probability"] for row in figures["predictions"]] == pytest.approx([probability] * 2, abs=1e-6)
    assert [row["most_probable"] for row in figures["predictions"]] == ["rose", "rose"]
    assert figures["images"] == 2 and rows[0] == {"id": "a", "strict": True}
    report = figures["probabilities"]
    assert report["accuracy"]["right"] == 1 and report["minus_greedy"]["difference"] == 0.0
    assert report["fitted_on"] == (60 if calibration else None)
