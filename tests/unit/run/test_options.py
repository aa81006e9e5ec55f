"""What a training prompt lists: the policy's own answers."""

import json
from dataclasses import replace

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import write_json
from rft_cluster.config import load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.messages import Completion, Group
from rft_cluster.prompts import make_question
from rft_cluster.run.asking import prompts_of
from rft_cluster.run.inside import sft_baseline, warm_start_run
from rft_cluster.run.options import OPTIONS_FILE, check_options, hard_options, with_options
from rft_cluster.run.task import Task
from tests.unit.run.begun import config, picture

CLASSES = ["aster", "bellflower", "crocus", "daisy", "elder", "foxglove"]
SHOWN = [LabelledImage(f"{label}.png", picture((40 * i, 0, 0)), label) for i, label in enumerate(CLASSES)]
DATASET = FewShotDataset.of("flowers", CLASSES, SHOWN, [], [], [])
TASK = Task(DATASET, make_question("closed", "flower", CLASSES))
SETTINGS = ("prompt.template=closed", "prompt.options=own_top_k", "prompt.top_k=3", "schedule.prompts_per_step=6")


def answering(answers: list[str], asked: list):
    """A policy that gives these answers about every image."""

    def generate(prompts, sampling):
        asked.extend(prompts)
        assert sampling.group_size == 8
        texts = [f"<answer>{answer}</answer>" for answer in answers]
        return [Group(p, [1], [Completion([1], [0.0], text, "stop", 0) for text in texts]) for p in prompts]

    return generate


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ({"elder": 5, "aster": 2, "daisy": 1}, ["aster", "crocus", "elder"]),
        ({"crocus": 6, "foxglove": 1, "aster": 1}, ["aster", "crocus", "foxglove"]),
        ({"daisy": 1, "bellflower": 1, "aster": 1}, ["aster", "bellflower", "crocus"]),  # ties: the first classes
    ],
)
def test_options_are_the_label_and_what_was_answered_most(votes, expected):
    assert hard_options("crocus", votes, CLASSES, 3, "key") == expected


def test_where_few_were_answered_others_are_drawn():
    drawn = [hard_options("crocus", {"elder": 8}, CLASSES, 4, f"key {i}") for i in range(60)]
    assert all(len(own) == 4 and {"crocus", "elder"} <= set(own) and own == sorted(own) for own in drawn)
    assert {label for own in drawn for label in own} == set(CLASSES)
    assert hard_options("crocus", {"elder": 8}, CLASSES, 4, "key 0") == drawn[0]


def test_prompts_list_the_options_in_drawn_orders_and_a_run_that_goes_on_asks_nobody(tmp_path, capsys):
    settings, asked = config(tmp_path, *SETTINGS), []
    settings.run_folder.mkdir()
    task = with_options(settings, TASK, 0, answering(["daisy"] * 5 + ["aster"] * 2 + ["thistle"], asked))
    assert [(p.prompt_id, p.label) for p in asked] == [(f"options/0/{i}", label) for i, label in enumerate(CLASSES)]
    assert len({prompt.text for prompt in asked}) > 1  # all classes, in drawn orders
    assert (
        "it named the right class of 2 of 6 images at least once, and 1.7 wrong ones an image; each prompt lists 3"
        in capsys.readouterr().out
    )
    assert task.options is not None and task.options["crocus.png"] == ("aster", "crocus", "daisy")
    record = json.loads((settings.run_folder / OPTIONS_FILE).read_text())["images"]["crocus.png"]
    assert record["votes"] == {"daisy": 5, "aster": 2} and record["label"] == "crocus"

    orders = set()
    for step in range(8):
        for prompt in prompts_of(settings, task, step):
            own = sorted(task.options[prompt.example_id], key=prompt.text.index)
            assert prompt.text == task.question.listing(own)
            orders |= {tuple(own)} if prompt.label == "crocus" else set()
    assert len(orders) > 2

    for step in (0, 4):
        again = with_options(settings, TASK, step, lambda *_: pytest.fail("asked again"))
        assert again == task


def test_classes_that_are_not_trained_are_no_options(tmp_path):
    settings = config(tmp_path, *SETTINGS)
    settings.run_folder.mkdir()
    task = Task(
        replace(DATASET, train=DATASET.train[:4]),
        make_question("closed", "flower", CLASSES, unseen=("elder", "foxglove")),
    )
    found = with_options(settings, task, 0, answering(["elder"] * 8, [])).options
    assert found is not None and {label for own in found.values() for label in own} <= set(CLASSES[:4])


def test_without_the_switch_nobody_is_asked(tmp_path):
    settings = config(tmp_path, "prompt.template=closed")
    assert with_options(settings, TASK, 0, lambda *_: pytest.fail("asked")) is TASK


def test_runs_inside_another_list_all():
    asked = load_config("digits", [*SETTINGS, "schedule.warm_start={steps: 4}"])
    assert warm_start_run(asked).prompt.options == sft_baseline(asked).prompt.options == "all"


def test_a_template_that_lists_nothing_and_options_that_are_all_classes_are_refused(tmp_path):
    check_options(config(tmp_path, *SETTINGS), TASK, 0)
    check_options(config(tmp_path, "prompt.top_k=9"), TASK, 0)
    thinking = Task(DATASET, make_question("think_answer", "flower", CLASSES))
    with pytest.raises(UserError, match=r"think_answer lists no classes: take prompt\.template=closed"):
        check_options(config(tmp_path, "prompt.options=own_top_k"), thinking, 0)
    with pytest.raises(UserError, match=r"prompt\.top_k is 6, and there are 6 classes to train.*lower prompt\.top_k"):
        check_options(config(tmp_path, *SETTINGS, "prompt.top_k=6"), TASK, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda images: images.pop("crocus.png"),
        lambda images: images["crocus.png"].update(options=["aster", "daisy", "elder"]),
        lambda images: images["crocus.png"].update(options=["crocus", "thistle"]),
        lambda images: images["crocus.png"].update(options="crocus"),
        lambda images: images.update({"crocus.png": 3}),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, damage):
    settings = config(tmp_path, *SETTINGS)
    settings.run_folder.mkdir()
    with_options(settings, TASK, 0, answering(["daisy"] * 8, []))
    file = settings.run_folder / OPTIONS_FILE
    values = json.loads(file.read_text())
    damage(values["images"])
    write_json(file, values)
    with pytest.raises(UserError, match="is damaged: bring it back"):
        with_options(settings, TASK, 0, lambda *_: pytest.fail("asked again"))
    with pytest.raises(UserError, match="is damaged: bring it back"):  # before anything starts
        check_options(settings, TASK, 0)
    check_options(settings, TASK, settings.schedule.steps)  # nothing is trained
    for content in (b"{", b"[]", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged: bring it back"):
            with_options(settings, TASK, 4, lambda *_: pytest.fail("asked again"))
    file.unlink()
    with pytest.raises(UserError, match="is missing, and has what each prompt lists"):
        check_options(settings, TASK, 4)
