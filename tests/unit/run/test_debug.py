"""Some completions of each step in the terminal."""

import pytest
from some_prompt import some_prompt

from rft_cluster.messages import Completion, Group, LearnerStats, Reward
from rft_cluster.run.debug import LONGEST, chosen, debug_lines
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.rollouts import rollout_rows
from tests.unit.run.begun import TASK, config
from tests.unit.run.steps import ADVANTAGES, GROUPS, LEARNER, REWARDS

ROSE = "<think>It is\x1b[31m red</think>\n<answer>rose</answer>"


def rows_of(text: str = ROSE, image_id: str = "roses/a.png", label: str = "pink primrose") -> list[dict]:
    prompt = some_prompt("train/0/0", image_id, label=label)
    completions = [Completion([1, 2], [-0.1] * 2, text, "stop", 0), Completion([1], [-0.1], "rose", "length", 0)]
    rewards = [
        Reward(1.0, {"format": 1.0, "accuracy": 0.0}),
        Reward(None, {"format": 0.0}, {"accuracy": "\x1b too late"}),
    ]
    return rollout_rows([Group(prompt, [1], completions)], [rewards], [[0.5, None]], LearnerStats())


def test_an_image_s_completions_with_what_they_earned_and_why(tmp_path):
    (tmp_path / "roses").mkdir()
    (tmp_path / "roses" / "a.png").touch()
    assert list(debug_lines(12, rows_of(), tmp_path)) == [
        f"step 12: {tmp_path}/roses/a.png, label 'pink primrose'",
        "  reward 1.00 (format 1, accuracy 0)  advantage +0.50  2 tokens  answered 'rose', label 'pink primrose'; "
        "format ok",
        "    <think>It is?[31m red</think> <answer>rose</answer>",
        "  masked (format 0)  no advantage  1 tokens  no answer block, label 'pink primrose'; format: no <think>; "
        "cut at max_tokens; accuracy failed: ? too late",
        "    rose",
    ]


@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname", "gone.png", "x" * 300])
def test_an_image_that_is_not_below_the_folder_is_shown_by_its_id(tmp_path, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.png").touch()
    first, *_ = debug_lines(1, rows_of(image_id=name), tmp_path / "photos")
    assert first == f"step 1: {name}, label 'pink primrose'"


def test_hostile_text_stays_on_its_line_and_long_text_is_cut():
    text = "<think>\u202e" + "x\n\x1b]0;title\x07" * 1000
    lines = list(debug_lines(1, rows_of(text, "a\n\x1b[2J.png", "ro\x1bse"), None))
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines)
    assert lines[0] == "step 1: a ?[2J.png, label 'ro?se'"
    assert lines[2].endswith("characters; all are in rollouts/)") and len(lines[2]) < LONGEST + 60


def test_the_groups_are_drawn_from_seed_and_step_alone():
    rows = [{"prompt_id": index} for index in range(20)]
    drawn = [tuple(row["prompt_id"] for row in chosen(rows, 4, seed, step)) for seed in (0, 1) for step in range(50)]
    assert drawn == [
        tuple(row["prompt_id"] for row in chosen(rows, 4, seed, step)) for seed in (0, 1) for step in range(50)
    ]
    assert len(set(drawn)) > 90
    assert all(sorted(one) == list(one) and len(set(one)) == 4 for one in drawn)
    assert {index for one in drawn for index in one} == set(range(20))
    assert chosen(rows, 30, 0, 0) == rows and chosen(rows, 0, 0, 0) == []


@pytest.mark.parametrize(("count", "images"), [(0, 0), (1, 1), (4, 2)])
def test_a_run_shows_as_many_images_of_a_step_as_it_was_asked_to(tmp_path, capsys, count, images):
    run = RunFolder(config(tmp_path, f"debug.rollouts={count}"), TASK)
    run.log_rollouts(1, GROUPS, REWARDS, ADVANTAGES, LEARNER)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step 1: digits/") for line in lines) == images
    assert len(lines) == 5 * images


def test_the_record_is_the_same_with_and_without(tmp_path):
    texts = set()
    for count in (0, 2):
        run = RunFolder(config(tmp_path / str(count), f"debug.rollouts={count}"), TASK)
        run.log_rollouts(1, GROUPS, REWARDS, ADVANTAGES, LEARNER)
        texts.add((run.path / "rollouts" / "step-000001.jsonl").read_text())
    assert len(texts) == 1
