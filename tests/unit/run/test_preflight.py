"""The room that a run needs on its disk."""

import json

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.messages import Completion, Group, Reward
from rft_cluster.prompts import make_question
from rft_cluster.run.journal import _to_row
from rft_cluster.run.preflight import calibration_note, check_deadlines, check_unread
from rft_cluster.run.space import JOURNALLED, journal_bytes
from rft_cluster.run.task import Task
from tests.unit.run.begun import begun, config
from tests.unit.some_prompt import some_prompt


@pytest.mark.parametrize(
    ("save", "steps"),
    [
        ("schedule.save_every=10", 30),  # those since the older of two checkpoints, until the next one is written
        ("schedule.save_every=30", 80),  # all of them
        ("schedule.save_minutes=0.25", 45),
        ("schedule.save_every=30 schedule.save_minutes=0.25", 45),  # whichever comes first
    ],
)
def test_the_journal_has_the_steps_since_the_oldest_checkpoint(tmp_path, save, steps):
    settings = ("schedule.steps=80", "schedule.save_every=0", "schedule.keep_checkpoints=2", *save.split())
    own = config(tmp_path, *settings, "sampling.max_tokens=16", "model.max_prompt_tokens=128")
    assert journal_bytes(own) == steps * 20 * (8 * 16 + 128) * JOURNALLED


def test_a_token_takes_no_more_room_than_is_planned():
    completion = Completion([151_644] * 256, [-0.123456789012] * 256, "petal " * 256, "length", 3)
    group = Group(some_prompt(), [151_655] * 300, [completion] * 8)
    row = json.dumps(_to_row(group, [Reward(1.0, {"format": 1.0, "accuracy": 0.0})] * 8))
    assert 0.7 < len(row) / ((8 * 256 + 300) * JOURNALLED) < 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.start_timeout=20"], r"^cluster\.start_timeout is 20 s, .* set it to 30 or more$"),
        (
            ["rewards.mine:judge=1", "cluster.step_timeout=60"],
            r"^cluster\.step_timeout is 60 s, but the reward actor may take scoring\.load_limit \(300 s\) and "
            r"scoring\.time_limit \(10 s\): it would count as lost. Raise cluster\.step_timeout above 310",
        ),
    ],
)
def test_deadlines_that_contradict_each_other_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        check_deadlines(config(tmp_path, *overrides))


@pytest.mark.parametrize("overrides", [[], ["cluster.step_timeout=5"], ["rewards.mine:judge=1"]])
def test_deadlines_that_agree_pass(tmp_path, overrides):
    check_deadlines(config(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("template", "every", "validation", "noted"),
    [("think_answer", 0, 50, True), ("think_answer", 20, 50, False), ("closed", 0, 50, False),
     ("think_answer", 0, 49, False)],
)  # fmt: skip
def test_a_run_that_cannot_be_calibrated_for_want_of_answers_says_so_before(
    tmp_path, template, every, validation, noted
):
    images = [LabelledImage(f"v{number}", f"{number}".encode(), "rose") for number in range(validation)]
    dataset = FewShotDataset.of("photos", ["rose", "tulip"], [], images, [], [])
    task = Task(dataset, make_question(template, "flower", dataset.classes))
    notes = calibration_note(config(tmp_path, f"schedule.evaluate_every={every}"), task)
    assert [("schedule.evaluate_every" in note) for note in notes] == [True] * noted


UNREAD = [
    ("evaluation.encoder=enc", "baselines=[encoder]", "enc, .*: add encoder to baselines, or leave evaluation.encoder"),
    ("prompt.top_k=3", "prompt.options=own_top_k", "3, .*: set prompt.options=own_top_k, or leave prompt.top_k out"),
    ("optimizer.sft_learning_rate=1e-5", "baselines=[sft]", "1e-05, .*: add sft to baselines, or set schedule.warm"),
    ("optimizer.sft_learning_rate=1e-5", "schedule.warm_start={steps: 2}", "1e-05, but nothing in this run reads it"),
]


@pytest.mark.parametrize(("override", "reader", "message"), UNREAD)
def test_a_key_that_nothing_reads_is_refused_with_what_would_read_it(tmp_path, override, reader, message):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{key} is {message}"):
        check_unread(config(tmp_path, override))
    check_unread(config(tmp_path, override, reader))
    check_unread(config(tmp_path))


def test_sft_alone_has_the_learning_rate_of_the_run(tmp_path):
    sft = ("algorithm.objective=sft", "algorithm.kl_beta=0", "optimizer.sft_learning_rate=1e-5")
    with pytest.raises(UserError, match=r"is 1e-05, but .* reads it: set optimizer\.learning_rate, or leave optimizer"):
        check_unread(config(tmp_path, *sft))


@pytest.mark.parametrize(("override", "reader", "message"), UNREAD)
def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path, override, reader, message):
    begun(tmp_path, override)  # by an earlier version
    check_unread(config(tmp_path, override))
    begun(tmp_path / "read", override, reader)  # as when it goes on for other baselines
    check_unread(config(tmp_path / "read", override))
    with pytest.raises(UserError, match="nothing in this run reads it"):
        check_unread(config(tmp_path, f"{override}4"))
