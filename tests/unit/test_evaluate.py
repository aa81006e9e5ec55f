"""The configuration of an evaluation, for any working folder and any name of the run's folder."""

import argparse
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rft_cluster import evaluate
from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.report import judge
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, config_text, load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.messages import Completion, Group
from rft_cluster.prompts import Question, make_question
from rft_cluster.run.task import Task

FOLDERS = ["runs/mine", "my #1/mine", "[2024] runs/mine", "runs: new/mine", "~me/$HOME", "a~/${HOME}", "no/01", "'/\""]


def run_in(folder: Path, data: str = "photos") -> Path:
    """A finished run, as far as finding its configuration goes."""
    (folder / "model").mkdir(parents=True)
    for name in ("manifest.json", "model/classifier.json"):
        (folder / name).write_text("{}")
    config = {
        "run": {"name": "mine"},
        "model": {"path": "tiny"},
        "data": {"source": "folder", "path": data, "manifest": "/earlier/manifest.json"},
        "rewards": {"my_rewards:brevity": 1},
        "schedule": {"steps": 4, "prompts_per_step": 2},
        "cluster": {"device": "cpu"},
    }
    (folder / "config.yaml").write_text(config_text(Config.model_validate(config)))
    return folder


def configured(export: Path | None, config: str | None = None, *overrides: str) -> Config:
    return evaluate._config(argparse.Namespace(config=config, overrides=list(overrides)), export)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "from elsewhere"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_brings_its_images_and_its_settings(tmp_path, monkeypatch, name, elsewhere):
    run = run_in(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" if elsewhere else tmp_path)
    given = run if elsewhere else Path(name)
    for config in (configured(given / "model"), configured(None, str(given / "config.yaml"))):
        assert config.data.manifest == given / "manifest.json"
        assert config.data.path == (tmp_path / "photos" if elsewhere else Path("photos"))
        assert config.run_folder.absolute() == run.absolute()
        assert config.rewards == {"format": 1.0, "accuracy": 1.0}


def test_what_is_typed_is_the_callers_word(tmp_path):
    run = run_in(tmp_path / "mine")
    overrides = ("data.manifest=my #2/manifest.json", "data.path=[2024] photos", "run.seed=7")
    config = configured(run / "model", None, *overrides)
    assert (config.data.manifest, config.data.path) == (Path("my #2/manifest.json"), Path("[2024] photos"))
    assert config.run.seed == 7
    (tmp_path / "mine.yaml").write_text(json.dumps({**json.loads(OWN), "rewards": {"my_rewards:brevity": 1}}))
    config = configured(run / "model", str(tmp_path / "mine.yaml"))
    assert config.data.manifest is None and config.rewards == {"my_rewards:brevity": 1.0}


OWN = """{"run": {"name": "own"}, "model": {"path": "tiny"}, "data": {"source": "digits"}, "cluster": {"device": "cpu"},
"schedule": {"steps": 4, "prompts_per_step": 2}}"""


ASKED = make_question("closed", "flower", ["rose", "tulip", "iris"])


class Engine:
    """Answers with the first class that the prompt lists."""

    def __len__(self) -> int:
        return 1

    def generate(self, prompts, sampling, version):
        return [
            Group(p, [1], [Completion([1], [0.0], f"<answer>{p.text.splitlines()[1]}</answer>", "stop", 0)])
            for p in prompts
        ]


@pytest.fixture
def task(monkeypatch) -> Task:
    @contextmanager
    def started(*_):
        yield Engine()

    monkeypatch.setattr("rft_cluster.cluster.start.start_generators", started)
    pictures = [
        LabelledImage(f"test/{i}", f"picture {i}".encode(), ("rose", "tulip")[i % 2])
        for i in range(evaluate.AT_ONCE + 4)
    ]
    return Task(FewShotDataset.of("photos", list(ASKED.classes), [], [], pictures, []), ASKED)


def options(orders: int | None) -> argparse.Namespace:
    return argparse.Namespace(orders=orders, votes=2, split="test")


def test_every_image_is_asked_about_in_each_of_the_other_orders(task):
    config, images = load_config("digits", []), task.dataset.test
    orders = evaluate._orders(options(3), config, task)
    assert len(orders) == 3 and all(sorted(order) == sorted(ASKED.classes) for order in orders)
    reader = AnswerReader(list(ASKED.classes), {})
    greedy, _, reordered, again = evaluate._ask(config, task, "model", images, options(3), orders, reader, 2)
    assert again == [], "without reasoning the second look is not taken in writing"
    assert {group.prompt.text for group in greedy} == {ASKED.text}
    for order, groups in zip(orders, reordered, strict=True):
        assert [group.prompt.example for group in groups] == images
        assert {group.prompt.text for group in groups} == {ASKED.listing(order)}
    judged = [judge(group, reader) for group in greedy]
    found = evaluate._over_orders(ASKED.classes, judged, orders, reordered, reader)["orders"]
    assert (found["first"]["answers"], found["same"]) == (1.0, 0.0), "it answers the first listed in each order"


class Thinking(Engine):
    """Says rose, and among its samples each class; asked again, the second option."""

    def generate(self, prompts, sampling, version):
        def said(prompt) -> list[str]:
            again = "It is one of these: rose, tulip." in prompt.text
            return ["tulip"] if again else ["rose", "tulip"][: sampling.group_size]

        return [
            Group(p, [1], [Completion([1], [0.0], f"<answer>{label}</answer>", "stop", 0) for label in said(p)])
            for p in prompts
        ]


def test_a_policy_that_thinks_is_asked_again_by_the_same_engines_with_room_for_the_options(task, monkeypatch):
    limits = []

    @contextmanager
    def started(config, *_):
        limits.append(config.model.max_prompt_tokens)
        yield Thinking()

    monkeypatch.setattr("rft_cluster.cluster.start.start_generators", started)
    config, images = load_config("digits", []), task.dataset.test
    thinks = replace(task, question=make_question("think_answer", "flower", list(ASKED.classes)))
    reader = AnswerReader(list(ASKED.classes), {})
    greedy, sampled, _, again = evaluate._ask(config, thinks, "model", images, options(0), [], reader, 2)
    assert len(greedy) == len(sampled) == len(again) == len(images)
    assert {(one.options, one.label) for one in again} == {(("rose", "tulip"), "tulip")}
    assert limits[0] > config.model.max_prompt_tokens
    judged = [judge(group, reader) for group in greedy]
    assert evaluate._second_look(again, judged)["second_look"]["strict"]["right"] == len(images) // 2
    assert evaluate._second_look([], judged) == {}


@pytest.mark.parametrize(("given", "number"), [(None, evaluate.ORDERS), (0, 0), (7, 5)])
def test_other_orders_are_asked_where_the_question_lists_the_classes(task, given, number):
    config = load_config("digits", [])
    assert len(evaluate._orders(options(given), config, task)) == number  # three classes have five other orders
    fixed = replace(task, question=Question("Which flower?"))
    if given:
        with pytest.raises(UserError, match="--orders is 7, but the question does not list the classes"):
            evaluate._orders(options(given), config, fixed)
    else:
        assert evaluate._orders(options(given), config, fixed) == []
    assert evaluate._over_orders(["a", "b"], [], [], [], AnswerReader(["a", "b"], {})) == {}
