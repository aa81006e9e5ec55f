"""What is scored for an evaluation, and what comes of it. The scores themselves are tested with a model."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from rft_cluster.classification.card import CARD_FILE, Calibration, make_card, read_card
from rft_cluster.classification.probabilities import Score
from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import ClusterError
from rft_cluster.config import Config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.messages import Completion, Group
from rft_cluster.prompts import make_prompts, make_question, narrowed
from rft_cluster.run.answers import write_answers
from rft_cluster.run.probabilities import Scored, calibrate, score_groups, with_probabilities
from rft_cluster.run.saving import is_calibrated
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
        self.started = 0

    @contextmanager
    def __call__(self, config: Config) -> Iterator[Callable[[str], Score]]:
        self.started += 1
        yield lambda path: self.opened.append(path) or self.score

    def score(self, image: bytes, question: str, before: str, answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((image, question, before))
        rose = 0.9 if "rose" in before else 0.6
        return np.log([rose, 1e-9, 1 - rose, 1e-9]), np.full(4, 3)


def scored(template: str, tmp_path, votes: Sequence[str]) -> tuple[Scored, Policy]:
    asked, policy = task(template), Policy()
    greedy = groups(asked, "<think>a rose</think><answer>tulip</answer>")
    return score_groups(config(tmp_path), asked, "model", greedy, groups(asked, *votes), policy), policy


def test_without_reasoning_every_image_is_scored_once_and_so_is_a_grey_one(tmp_path):
    found, policy = scored("closed", tmp_path, ["<answer>rose</answer>"] * 3)
    assert policy.opened == ["model"]
    *images, grey = policy.asked
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


def test_votes_that_are_not_given_are_not_scored(tmp_path):
    asked, policy = task("think_answer"), Policy()
    greedy = groups(asked, "<think>a rose</think><answer>tulip</answer>")
    found = score_groups(config(tmp_path), asked, "model", greedy, [], policy)
    assert found.after_votes == [] and len(found.after_greedy) == len(policy.asked) == 2


def test_a_second_look_scores_the_most_probable_classes_alone(tmp_path):
    asked, policy = task("answer_only"), Policy()
    written = groups(asked, "<answer>rose</answer>")
    own = config(tmp_path, "prompt.subject=flower")
    found = score_groups(own, asked, "model", written, written, policy, options=2)
    again = narrowed(asked.question, "flower", CLASSES)
    assert [question for _, question, _ in policy.asked] == [asked.text, again, asked.text, again, asked.text]
    assert [(one.options, one.label) for one in found.again] == [(("rose", "tulip"), "rose")] * 2
    rows = [{"id": "a", "strict": True}, {"id": "b", "strict": False}]
    figures = with_probabilities({"predictions": rows}, found, DATASET.test, CLASSES, None)
    assert figures["probabilities"]["second_look"]["accuracy"]["right"] == 1


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


# The temperature


def finished(folder: Path, template: str, images: int = 60, steps: tuple[int, int] = (40, 20)) -> tuple[Config, Task]:
    """A run whose last and best policies are exported, with validation images: of six, five are roses."""
    validation = [LabelledImage(f"v{i}", picture((i, 0, 0)), "tulip" if i % 6 == 0 else "rose") for i in range(images)]
    train = [LabelledImage(f"t{i}", picture((0, i, 9)), label) for i, label in enumerate(CLASSES)]
    dataset = FewShotDataset.of("photos", CLASSES, train, validation, TEST, [])
    asked = Task(dataset, make_question(template, "flower", CLASSES))
    own = config(folder, "schedule.steps=40", "data.validation=60")
    for name, step in zip(("model", "model-best"), steps, strict=True):
        (own.run_folder / name).mkdir(parents=True)
        card = make_card(own, dataset, asked.question, (3136, 3136)).model_copy(update={"steps": step})
        (own.run_folder / name / CARD_FILE).write_text(json.dumps(card.record()))
    return own, asked


def test_the_temperature_is_in_the_card_of_each_exported_model(tmp_path):
    """The policy says rose with 60 %, and 50 of 60 are roses, of 61 by its rule: (0.6 / 0.4)^(1/T) = 50 / 11."""
    own, asked = finished(tmp_path, "closed")
    policy = Policy()
    lines = calibrate(own, asked, policy)
    assert policy.opened == [str(own.run_folder / name) for name in ("model", "model-best")] and policy.started == 1
    wanted = np.log(0.6 / 0.4) / np.log(50 / 11)
    for name in ("model", "model-best"):
        found = read_card(own.run_folder / name).calibration
        assert found is not None
        assert (found.temperature, found.images) == (pytest.approx(wanted, rel=0.001), 60)
    record = json.loads((own.run_folder / "calibration.json").read_text())["models"]
    assert {name: model["steps"] for name, model in record.items()} == {"model": 40, "model-best": 20}
    for model in record.values():
        assert model["fitted"]["log_loss"]["value"] < model["unfitted"]["log_loss"]["value"]
    assert lines[0].startswith("probabilities of model are calibrated on 60 validation images: temperature 0.2")
    assert "the calibration error from 23.3 to " in lines[0]


def test_a_last_policy_that_is_the_best_is_scored_once(tmp_path):
    own, asked = finished(tmp_path, "closed", steps=(40, 40))
    policy = Policy()
    calibrate(own, asked, policy)
    assert policy.opened == [str(own.run_folder / "model")]
    assert read_card(own.run_folder / "model").calibration == read_card(own.run_folder / "model-best").calibration


def test_with_fewer_than_50_images_nothing_is_fitted_or_started(tmp_path):
    own, asked = finished(tmp_path, "closed", images=49)
    policy = Policy()
    (line,) = calibrate(own, asked, policy)
    assert "not calibrated: there are 49 validation images, and that needs 50" in line
    assert policy.started == 0 and read_card(own.run_folder / "model").calibration is None
    assert own.data.validation >= 50 and is_calibrated(own)  # as where some of the classes are not trained


@pytest.mark.parametrize("said", [50, 49])
def test_a_policy_that_thinks_is_scored_after_its_recorded_reasoning(said, tmp_path):
    """The temperature is fitted on those in the format, if there are enough."""
    own, asked = finished(tmp_path, "think_answer")
    examples = asked.dataset.validation
    for step in (20, 40):
        texts = [*[f"<think>{step}</think><answer>rose</answer>"] * said, *["nothing"] * (60 - said)]
        judged = [
            Judged(one.example_id, one.label, text, "rose", True, True, True)
            for one, text in zip(examples, texts, strict=True)
        ]
        write_answers(own.run_folder, step, "validation", judged)
    policy = Policy()
    (line, *_) = calibrate(own, asked, policy)
    if said < 50:
        assert policy.asked == [] and is_calibrated(own)
        assert "after step 40 49 of the 60 answers to validation images have the format, and that needs 50" in line
        return
    images = [asked.dataset.image(example) for example in examples[:said]]
    assert policy.asked == [(one, asked.text, f"<think>{step}</think><answer>") for step in (40, 20) for one in images]
    found = read_card(own.run_folder / "model").calibration
    assert found is not None and found.images == 50
    # Of the first 50 images 41 are roses, and of 51 by the rule: (0.6 / 0.4)^(1/T) = 41 / 10.
    assert found.temperature == pytest.approx(np.log(0.6 / 0.4) / np.log(41 / 10), rel=0.001)


@pytest.mark.parametrize("mishap", ["no answers", "loss"])
def test_what_keeps_a_temperature_from_being_fitted_is_recorded_and_the_run_ends_well(tmp_path, mishap):
    own, asked = finished(tmp_path, "think_answer" if mishap == "no answers" else "closed")

    class Lost(Policy):
        def score(self, *_):
            raise ClusterError("class-scorer died", ["class-scorer"])

    (line,) = calibrate(own, asked, Policy() if mishap == "no answers" else Lost())
    reason = "no answer to v0 after step 40 is recorded" if mishap == "no answers" else "class-scorer died"
    assert reason in line
    assert reason in json.loads((own.run_folder / "calibration.json").read_text())["skipped"]
    assert is_calibrated(own) == (mishap == "no answers"), "what a resumed run can mend, it tries again"
    assert read_card(own.run_folder / "model").calibration is None
