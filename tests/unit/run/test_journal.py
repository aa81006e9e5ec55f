"""What was journalled is learned from again as it was, and nothing else is."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from some_prompt import some_prompt

from rft_cluster.config import load_config
from rft_cluster.messages import Augmentation, Completion, Group, Prompt, Reward
from rft_cluster.run.journal import SETTINGS, Journal, prune_journal, settings_digest
from tests.unit.run.begun import config

TURNED = Augmentation((0, 0, 1, 1), False, 10.0, (1, 1, 1))


def prompts(step: int) -> list[Prompt]:
    return [some_prompt(f"train/{step}/{i}", f"{i}.png", b"png", "Which?", "rose", 7 * step + i) for i in range(2)]


def scored(step: int) -> tuple[list[Group], list[list[Reward]]]:
    """Two groups of two completions, with what is awkward to write down."""
    first = Completion([5, 2**31 - 1], [-0.1, -1e-300], "ro\u2028se \ud800 \x00 <b>", "stop", step)
    second = Completion([], [], "", "length", step, ((step, 40), (step + 1, 2)))
    rewards = [
        Reward(1 / 3, {"format": 1.0, "my:f": -0.0}),
        Reward(None, {"format": 0.0}, {"my:judge": "no answer within 10 s"}),
    ]
    return [Group(prompt, [1, 2, step], [first, second]) for prompt in prompts(step)], [rewards, rewards[::-1]]


def opened(folder: Path, first: int = 0, *overrides: str) -> Journal:
    return Journal(load_config("digits", [f"run.folder={folder.parent}", f"run.name={folder.name}", *overrides]), first)


def journalled(folder: Path, steps: int) -> list[Path]:
    journal = opened(folder)
    for step in range(steps):
        journal.commit(step, *scored(step))
    return sorted((folder / "journal").iterdir())


def replayed(folder: Path, first: int = 0, *overrides: str) -> list[int]:
    """The steps that a run gets back when it goes on from `first`, each as it was."""
    journal, steps = opened(folder, first, *overrides), []
    for step in range(first, first + 10):
        if recorded := journal.recorded(step, prompts(step)):
            assert recorded.wait() == scored(step)
            steps.append(step)
    return steps


def test_a_run_that_goes_on_gets_every_step_back_as_it_was(tmp_path, capsys):
    files = journalled(tmp_path, 4)
    assert [file.name for file in files] == [f"step-00000{number}.jsonl" for number in (1, 2, 3, 4)]
    assert replayed(tmp_path) == [0, 1, 2, 3]
    assert "steps 1 to 4 are in the journal" in capsys.readouterr().out
    assert replayed(tmp_path, first=2) == [2, 3]
    capsys.readouterr()
    assert replayed(tmp_path, first=4) == []
    assert capsys.readouterr().out == ""


def test_a_step_is_on_the_disk_when_it_is_committed(tmp_path, monkeypatch):
    journal, events = opened(tmp_path), []
    fsync, replace_file = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda opened: events.append("sync") or fsync(opened))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or replace_file(*paths))
    journal.commit(0, *scored(0))
    assert events == ["sync", "rename", "sync"], "the file, its name, the folder"


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_step_and_those_after_it_are_generated_again(tmp_path, capsys, damage):
    whole = journalled(tmp_path, 4)[2].read_bytes()
    for at in range(0, len(whole), 97):
        later = journalled(tmp_path, 4)
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        later[2].write_bytes(whole[:at] if damage == "cut" else flipped)
        assert replayed(tmp_path) == [0, 1]
        assert capsys.readouterr().out.count(f"WARNING: {later[2]} is damaged") == 1
        assert sorted((tmp_path / "journal").iterdir()) == later[:2]


@pytest.mark.parametrize(
    "change",
    [
        lambda prompt: replace(prompt, seed=99),
        lambda prompt: replace(prompt, text="What?"),
        lambda prompt: some_prompt(prompt.prompt_id, "0.png", b"other", "Which?", "rose", prompt.seed),
        lambda prompt: some_prompt(prompt.prompt_id, "0.png", b"png", "Which?", "tulip", prompt.seed),
        lambda prompt: replace(prompt, example=prompt.example.changed(TURNED)),
    ],
)
def test_what_was_recorded_for_other_prompts_is_not_taken(tmp_path, change):
    journalled(tmp_path, 3)
    journal = opened(tmp_path)
    first, second = prompts(1)
    assert journal.recorded(0, prompts(0))
    assert journal.recorded(1, [first, change(second)]) is None
    assert journal.recorded(2, prompts(2)) is None, "another policy wrote it than this run will have"
    journal.commit(1, *scored(1))
    assert replayed(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("schedule.steps=90", False),  # so other learning rates: the policies that wrote these steps will not be there
        ("optimizer.learning_rate=1e-6", False),
        ("rewards.accuracy=2", False),
        ("learners.count=1", True),
        ("schedule.save_every=7", True),
        ("scoring.failure_budget=0.5", True),
    ],
)
def test_what_a_run_of_other_settings_journalled_is_not_taken(tmp_path, capsys, override, kept):
    (file, *_) = journalled(tmp_path, 2)
    assert replayed(tmp_path, 0, override) == ([0, 1] if kept else [])
    said = f"step 1 and those after it are generated again: {file} is of other settings"
    assert capsys.readouterr().out.count(said) == (not kept)


def test_the_order_of_settings_does_not_matter(tmp_path):
    own = ["rewards.my:a=1", "rewards.my:b=2"]
    journal = opened(tmp_path, 0, *own)
    journal.commit(0, *scored(0))
    assert replayed(tmp_path, 0, *reversed(own)) == [0]


def test_a_journal_of_a_version_without_families_is_as_good(tmp_path):
    """It limited images in pixels, too, and had no SFT."""
    nothing = ("model.min_image_tokens=null", "model.max_image_tokens=null")
    pixels = (*nothing, "model.min_pixels=3136", "model.max_pixels=3136")
    settings = config(tmp_path, *pixels).model_dump(mode="json", include=SETTINGS)
    for key in ("family", "min_image_tokens", "max_image_tokens"):
        del settings["model"][key]
    del settings["algorithm"]["objective"], settings["optimizer"]["sft_learning_rate"]
    del settings["schedule"]["warm_start"]
    del settings["schedule"]["min_live"]
    del settings["prompt"]["options"], settings["prompt"]["top_k"]
    then = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert settings_digest(config(tmp_path, *pixels)) == then
    for other in (
        ["model.family=qwen3_vl"],
        ["schedule.min_live=0.5"],
        ["prompt.options=own_top_k"],
        ["algorithm.objective=sft", "algorithm.kl_beta=0"],
    ):
        assert settings_digest(config(tmp_path, *pixels, *other)) != then


def test_further_rounds_are_given_back_as_many_as_there_were(tmp_path):
    """Here the prompts of the next step stand for those of a further round."""
    groups, rewards = (both for both in zip(scored(0), scored(1), strict=True))
    opened(tmp_path).commit(0, [*groups[0], *groups[1]], [*rewards[0], *rewards[1]])
    found = opened(tmp_path).recorded(0, prompts(0), iter([prompts(1), prompts(2), prompts(3)]))
    assert found is not None and [group.prompt for group in found.groups] == [*prompts(0), *prompts(1)]
    assert opened(tmp_path).recorded(0, prompts(0), iter([prompts(2)])) is None
    opened(tmp_path).commit(0, *scored(0))
    assert len(opened(tmp_path).recorded(0, prompts(0), iter([prompts(1)])).groups) == 2


def test_fewer_or_more_prompts_than_recorded_are_others(tmp_path):
    for asked in (prompts(0)[:1], [*prompts(0), prompts(1)[0]], []):
        journalled(tmp_path, 1)
        assert opened(tmp_path).recorded(0, asked) is None


@pytest.mark.parametrize("body", ["{}", '{"prompt": 3}', "[]", "nothing", '{"prompt": null, "completions": {}}', ""])
def test_a_strangers_journal_is_data_with_a_checksum_that_fits_or_not(tmp_path, body):
    (file,) = journalled(tmp_path, 1)
    head, *rows = [json.loads(line) for line in file.read_text().splitlines()]
    for rewritten in (body, json.dumps({**rows[0], "completions": [{"token_ids": "%"}]}) + "\n" + json.dumps(rows[1])):
        seal = hashlib.sha256((head["settings"] + rewritten).encode()).hexdigest()
        head = {**head, "sha256": seal}
        file.write_text(json.dumps(head) + "\n" + rewritten)
        assert replayed(tmp_path) == []


def test_steps_after_a_gap_and_half_a_file_are_removed_and_what_is_not_ours_stays(tmp_path):
    """In a stranger's run folder `journal` may be a link to any folder."""
    journalled(tmp_path, 2)
    for name in ("step-000003.jsonl.tmp", "step-000009.jsonl", "step-x.jsonl", "diary.txt", "diary.tmp"):
        (tmp_path / "journal" / name).write_text("{}")
    (tmp_path / "journal" / "step-by-step").mkdir()
    assert replayed(tmp_path) == [0, 1]
    own = {"step-000001.jsonl", "step-000002.jsonl"}
    others = {"step-x.jsonl", "diary.txt", "diary.tmp", "step-by-step"}
    assert {file.name for file in (tmp_path / "journal").iterdir()} == own | others


def test_steps_before_the_oldest_checkpoint_are_removed(tmp_path):
    journalled(tmp_path, 5)
    prune_journal(tmp_path, 3)
    assert [file.name for file in sorted((tmp_path / "journal").iterdir())] == [f"step-00000{n}.jsonl" for n in (4, 5)]
    assert replayed(tmp_path, first=3) == [3, 4]
