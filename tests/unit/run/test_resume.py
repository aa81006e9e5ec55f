import errno
import functools
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from rft_cluster.common.errors import Unavailable, UserError
from rft_cluster.common.files import DiskFull
from rft_cluster.config import Config
from rft_cluster.data.manifest import manifest
from rft_cluster.prompts import text_hash
from rft_cluster.run.checkpoints import checkpoint_folder
from rft_cluster.run.folder import CONFIG_END, RunFolder
from rft_cluster.run.lock import holder, locked
from rft_cluster.run.preflight import check_run_folder
from rft_cluster.run.resume import (
    MAY_CHANGE,
    Start,
    check_begun,
    check_kinds,
    find_start,
    raise_with_cure,
    read_saved_config,
    read_task,
    resume_line,
)
from rft_cluster.run.task import prepare
from tests.unit.run.begun import DATASET, begun, checkpoint, config, picture, rewrite_state


def test_a_new_run_begins_at_zero_and_nothing_is_written(tmp_path):
    for resume in (False, True):
        assert find_start(config(tmp_path), resume) == Start()
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_not_overwritten(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'mine'} exists: add --resume")):
        find_start(config(tmp_path), resume=False)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "left", [(), ("evaluation-base-test/evaluation.json",), (".lock",), ("notes.txt", "log.txt", "rollouts/x")]
)
def test_a_folder_without_a_run_s_records_is_no_run(tmp_path, left, resume):
    for name in left:
        file = tmp_path / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert find_start(config(tmp_path), resume) == Start()


@pytest.mark.parametrize("record", ["config.yaml", "metrics.jsonl", "eval.jsonl", "checkpoints", "model"])
def test_each_of_a_run_s_records_makes_it_a_run(tmp_path, record):
    begun(tmp_path)
    run = tmp_path / "mine"
    (run / "config.yaml").rename(run / record)
    with pytest.raises(UserError, match="exists: add --resume"):
        find_start(config(tmp_path), resume=False)


def test_a_run_without_a_checkpoint_begins_again_and_says_so(tmp_path):
    begun(tmp_path)
    start = find_start(config(tmp_path), resume=True)
    assert start.step == 0
    assert start.notes == (f"{tmp_path / 'mine'} goes on with step 1: none was saved",)


def test_it_goes_on_from_the_newest_checkpoint_and_says_so(tmp_path):
    run = begun(tmp_path)
    for step in (40, 60, 9):
        checkpoint(run, step)
    (run / "checkpoints" / "step-000070.tmp").mkdir()
    start = find_start(config(tmp_path), resume=True)
    newest = checkpoint_folder(run, 60)
    assert (start.step, start.checkpoint.path, start.checkpoint.state.optimizer_updates) == (60, newest, 60)
    assert start.notes == (f"{run} goes on after step 60 of 80, from {newest}",)


# --- another configuration


OTHER_VALUES = {
    "model.path": "elsewhere",
    "model.freeze_vision": "true",
    "model.lora": "{rank: 4}",
    "model.min_image_tokens": "1",
    "model.max_prompt_tokens": "64",
    "data.source": "folder",
    "data.shots": "2",
    "data.test": "3",
    "data.classes": "[rose, tulip]",
    "data.augment.crop": "0.1",
    "evaluation.also": "{source: digits, subject: other digit}",
    "schedule.warm_start": "{steps: 4}",
    "prompt.template": "weak",
    "prompt.subject": "ripe fruit",
    "sampling.temperature": "0.5",
    "algorithm.importance_cap": "null",
    "algorithm.kl_beta": "0.1",
    "optimizer.learning_rate": "1e-5",
    "optimizer.betas": "[0.8, 0.9]",
    "schedule.prompts_per_step": "3",
    "schedule.max_staleness": "1",
    "rewards.format": "2",
    "run.seed": "1",
}


@pytest.mark.parametrize(("key", "value"), OTHER_VALUES.items())
@pytest.mark.parametrize("before", [True, False], ids=["was set", "is set"])
def test_a_changed_key_is_named_alone_and_its_cure_works(tmp_path, key, value, before):
    """Begun with the other value and resumed with the usual one, and the other way round."""
    other = [f"{key}={value}"]
    first, second = (other, []) if before else ([], other)
    checkpoint(begun(tmp_path, *first), 40)
    with pytest.raises(UserError, match="was started with another configuration") as refused:
        find_start(config(tmp_path, *second), resume=True)
    _, *lines = str(refused.value).splitlines()
    (line,) = lines
    assert line.startswith(f"  {key} was ")
    (cure,) = shlex.split(cure_of(line, key))
    assert find_start(config(tmp_path, *second, cure), resume=True).step == 40
    assert find_start(config(tmp_path, *second, "run.name=other"), resume=False) == Start()


def test_a_run_that_began_with_limits_in_pixels_resumes_with_the_same_in_tokens(tmp_path):
    nothing = ("model.min_image_tokens=null", "model.max_image_tokens=null")
    began = (*nothing, "model.min_pixels=3136", "model.max_pixels=3136")
    checkpoint(begun(tmp_path, *began), 40)
    four = ("model.min_image_tokens=4", "model.max_image_tokens=4")
    assert find_start(config(tmp_path, *four), resume=True).step == 40
    with pytest.raises(UserError, match=r"model.max_pixels was 3136 and is null"):
        find_start(config(tmp_path, "model.min_image_tokens=4", "model.max_image_tokens=5"), resume=True)


def cure_of(line: str, key: str) -> str:
    """The text after the last colon and before the override to type."""
    at = max(line.find(f": {key}="), line.find(f": '{key}="))
    assert at > 0, line
    return line[at + 2 :]


def test_several_changed_keys_have_a_line_each(tmp_path):
    checkpoint(begun(tmp_path), 40)
    with pytest.raises(UserError) as refused:
        find_start(config(tmp_path, "run.seed=1", "data.shots=2", "schedule.steps=90"), resume=True)
    assert {line.split()[0] for line in str(refused.value).splitlines()[1:]} == {"data.shots", "run.seed"}


def test_a_reward_that_was_not_there_is_to_be_left_out(tmp_path):
    checkpoint(begun(tmp_path), 40)
    with pytest.raises(UserError, match=r"rewards\.my:own is 1\.0 and was not set: leave it out"):
        find_start(config(tmp_path, "rewards.my:own=1"), resume=True)


def test_an_alias_that_was_not_there_is_to_be_left_out(tmp_path):
    checkpoint(begun(tmp_path), 40)
    with pytest.raises(UserError, match=r'data\.aliases was \{\} and is \{"rose": \["dog"\]\}: leave rose out'):
        find_start(config(tmp_path, "data.aliases={rose: [dog]}"), resume=True)


@pytest.mark.parametrize(
    "override",
    [
        *("learners.count=1", "learners.micro_batch_tokens=400", "generators.count=2", "cluster.step_timeout=60"),
        *("scoring.time_limit=3", "data.path=/elsewhere/photos", "data.manifest=/elsewhere/manifest.json"),
        *("run.sinks=[json.dumps]", "schedule.stop_when_stuck=0"),
        *("schedule.save_every=3", "schedule.save_minutes=2", "schedule.evaluate_every=7"),
        *("schedule.keep_checkpoints=3", "schedule.steps=90", "schedule.steps=40"),
    ],
)
def test_where_how_and_how_long_it_runs_may_change(tmp_path, override):
    checkpoint(begun(tmp_path), 40)
    assert find_start(config(tmp_path, override), resume=True).step == 40


def test_the_pictures_of_a_table_may_have_moved(tmp_path):
    table = ("data.source=csv", "data.path=/here/train.csv")
    checkpoint(begun(tmp_path, *table, "data.images=/here/photos"), 40)
    assert find_start(config(tmp_path, *table, "data.images=/elsewhere/photos"), resume=True).step == 40


ALSO = ("evaluation.also.source=csv", "evaluation.also.path=/here/birds.csv", "evaluation.also.images=/here/birds")


@pytest.mark.parametrize(
    "override",
    [
        *("path=/elsewhere/birds.csv", "images=/elsewhere/birds", "images=null"),
        *("manifest=/elsewhere/manifest.json", "manifest=manifest-also.json"),
    ],
)
def test_the_other_data_set_may_have_moved(tmp_path, override):
    checkpoint(begun(tmp_path, *ALSO), 40)
    assert find_start(config(tmp_path, *ALSO, f"evaluation.also.{override}"), resume=True).step == 40


@pytest.mark.parametrize("override", ["download=true", "held_out=/elsewhere/flowers"])
def test_the_archive_of_the_other_data_set_may_have_moved(tmp_path, override):
    hub = ("evaluation.also.source=huggingface", "evaluation.also.path=owner/name")
    checkpoint(begun(tmp_path, *hub), 40)
    assert find_start(config(tmp_path, *hub, f"evaluation.also.{override}"), resume=True).step == 40


def test_of_a_section_within_a_section_the_changed_keys_alone_are_named(tmp_path):
    checkpoint(begun(tmp_path, *ALSO, "schedule.warm_start={steps: 4}"), 40)
    changed = ("evaluation.also.path=/elsewhere/birds.csv", "evaluation.also.test=20", "schedule.warm_start.steps=5")
    with pytest.raises(UserError) as refused:
        find_start(config(tmp_path, *ALSO, *changed), resume=True)
    assert str(refused.value).splitlines()[1:] == [
        "  evaluation.also.test was 200 and is 20: evaluation.also.test=200",
        "  schedule.warm_start.steps was 4 and is 5: schedule.warm_start.steps=4",
    ]


def test_of_a_section_that_was_not_there_the_keys_that_were_set_are_named(tmp_path):
    checkpoint(begun(tmp_path), 40)
    with pytest.raises(UserError) as refused:
        find_start(config(tmp_path, "evaluation.also.source=digits"), resume=True)
    assert str(refused.value).splitlines()[1:] == [
        '  evaluation.also was null and is {"source": "digits"}: evaluation.also=null'
    ]


@pytest.mark.parametrize("rate", ["0.01", "null"])
def test_the_learning_rate_of_sft_may_change_unless_there_is_a_warm_start(tmp_path, rate):
    began, now = "optimizer.sft_learning_rate=0.001", f"optimizer.sft_learning_rate={rate}"
    warm = "schedule.warm_start={steps: 4}"
    checkpoint(begun(tmp_path / "without", began), 40)
    assert find_start(config(tmp_path / "without", now), resume=True).step == 40
    checkpoint(begun(tmp_path / "with", began, warm), 40)
    with pytest.raises(UserError) as refused:
        find_start(config(tmp_path / "with", now, warm), resume=True)
    (line,) = str(refused.value).splitlines()[1:]
    assert line == f"  optimizer.sft_learning_rate was 0.001 and is {rate}: {began}"
    assert find_start(config(tmp_path / "with", now, warm, began), resume=True).step == 40


def test_every_key_that_may_change_is_one(tmp_path):
    settings = config(tmp_path, *ALSO)
    for key in MAY_CHANGE:
        *above, name = key.split(".")
        section = functools.reduce(getattr, above, settings)
        assert name in type(section).model_fields


def test_a_moved_run_goes_on(tmp_path):
    checkpoint(begun(tmp_path / "here"), 40)
    (tmp_path / "here").rename(tmp_path / "there")
    assert find_start(config(tmp_path / "there"), resume=True).step == 40


def test_other_steps_are_said_with_what_the_learning_rate_does(tmp_path):
    checkpoint(begun(tmp_path), 40)
    notes = find_start(config(tmp_path, "schedule.steps=120"), resume=True).notes
    assert notes[0] == (
        "schedule.steps was 80 and is 120: from here on the learning rate falls linearly to 0 at step 120, no longer "
        "at step 80"
    )
    assert len(notes) == 2
    with pytest.raises(UserError, match=r"has done 40 steps, and schedule.steps is 30: set schedule.steps=40 or more"):
        find_start(config(tmp_path, "schedule.steps=30"), resume=True)


# --- other images, another question


FOLDER = ("data.source=folder", "data.shots=2", "data.validation=3", "data.test=4")


def photos(root: Path, **counts: int) -> None:
    for number, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / label / f"{i}.png").write_bytes(picture((10 * number, 10 * i, len(root.name))))


def of_folder(tmp_path: Path, *overrides: str) -> Config:
    return config(tmp_path / "runs", *FOLDER, f"data.path={tmp_path / 'photos'}", *overrides)


@pytest.fixture
def run_of_photos(tmp_path) -> tuple[Path, list[str], list[str]]:
    """A run on some of the pictures in a folder: its folder, the pictures in use, and the others."""
    photos(tmp_path / "photos", rose=8, tulip=8)
    settings = of_folder(tmp_path)
    task = prepare(settings)
    run = RunFolder(settings, task, 0).path
    checkpoint(run, 40, prompt_sha256=text_hash(task.text))
    used = [example.example_id for example in task.examples]
    every = [str(path.relative_to(tmp_path / "photos")) for path in (tmp_path / "photos").rglob("*.png")]
    return run, used, sorted(set(every) - set(used))


def go_on(tmp_path: Path, *overrides: str) -> list[str]:
    """The images of the run as it goes on."""
    settings = of_folder(tmp_path, *overrides)
    return [example.example_id for example in read_task(find_start(settings, resume=True), settings).examples]


def change(tmp_path: Path, others: list[str], what: str) -> None:
    root = tmp_path / "photos"
    if what == "a picture more":
        (root / "rose" / "0-new.png").write_bytes(picture("white"))
    elif what == "a copy more":
        (root / "rose" / "0-new.png").write_bytes((root / others[0]).read_bytes())
    elif what == "an unused one gone":
        (root / others[0]).unlink()
    elif what == "an unused one changed":
        (root / others[0]).write_bytes(picture("white"))
    elif what == "a class more":
        photos(root, daisy=5)
    else:
        photos(root, **{"another class": 3, "0": 2})


@pytest.mark.parametrize(
    "what",
    [
        "a picture more",
        "a copy more",
        "an unused one gone",
        "an unused one changed",
        "a class more",
        "two classes more",
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["", "with data.manifest"])
def test_what_lies_beside_a_run_s_images_does_not_matter(tmp_path, run_of_photos, what, given):
    run, used, others = run_of_photos
    change(tmp_path, others, what)
    assert go_on(tmp_path, *([f"data.manifest={run / 'manifest.json'}"] if given else [])) == used


def test_the_other_data_set_keeps_its_images_when_pictures_come_and_says_what_is_gone(tmp_path):
    photos(tmp_path / "photos", rose=8, tulip=8)
    photos(tmp_path / "birds", wren=8, finch=8)
    also = ("source=folder", f"path={tmp_path / 'birds'}", "test=4")
    settings = of_folder(tmp_path, *(f"evaluation.also.{one}" for one in also))
    task = read_task(Start(), settings)
    assert task.also is not None and RunFolder(settings, task, 0).path.is_dir()
    photos(tmp_path / "birds", robin=8)
    (tmp_path / "birds" / "wren" / "0-new.png").write_bytes(picture("white"))
    again = read_task(find_start(settings, resume=True), settings).also
    assert again is not None and again.dataset.splits == task.also.dataset.splits
    (tmp_path / "birds").rename(tmp_path / "moved")
    moved = of_folder(
        tmp_path, *(f"evaluation.also.{one}" for one in also), f"evaluation.also.path={tmp_path / 'moved'}"
    )
    elsewhere = read_task(find_start(moved, resume=True), moved).also
    assert elsewhere is not None and elsewhere.dataset.splits == task.also.dataset.splits
    (tmp_path / "moved").rename(tmp_path / "birds")
    (tmp_path / "birds" / task.also.dataset.test[0].example_id).unlink()
    with pytest.raises(UserError, match=f"test: {task.also.dataset.test[0].example_id}: missing"):
        read_task(find_start(settings, resume=True), settings)


def test_a_folder_of_images_may_have_moved(tmp_path, run_of_photos):
    _, used, _ = run_of_photos
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert go_on(tmp_path, f"data.path={tmp_path / 'moved'}") == used


@pytest.mark.parametrize(
    ("how", "said"), [("gone", "missing"), ("changed", "its bytes have changed"), ("in another class", "missing")]
)
@pytest.mark.parametrize("index", [0, 4, -1], ids=["train", "validation", "test"])
def test_only_what_is_gone_or_changed_of_a_run_s_own_images_is_refused(tmp_path, run_of_photos, how, said, index):
    run, used, _ = run_of_photos
    file = tmp_path / "photos" / used[index]
    before = file.read_bytes()
    file.unlink()
    if how == "changed":
        file.write_bytes(picture("white"))
    elif how == "in another class":
        (tmp_path / "photos" / "daisy").mkdir()
        (tmp_path / "photos" / "daisy" / file.name).write_bytes(before)
    with pytest.raises(UserError, match=re.escape(f"{run} resumes with the images it was started with")) as refused:
        go_on(tmp_path)
    _, *lines = str(refused.value).splitlines()
    assert len(lines) == 1
    assert f": {used[index]}: {said}" in lines[0]
    file.write_bytes(before)  # the cure
    if how == "in another class":
        (tmp_path / "photos" / "daisy" / file.name).unlink()
        (tmp_path / "photos" / "daisy").rmdir()
    assert go_on(tmp_path) == used


def test_a_run_is_resumed_with_its_own_prompt(tmp_path, run_of_photos):
    run, _, _ = run_of_photos
    rewrite_state(checkpoint_folder(run, 40), prompt_sha256="0" * 64)
    with pytest.raises(UserError, match="another prompt"):
        go_on(tmp_path)


def test_a_run_that_goes_on_reads_its_own_images(tmp_path):
    run = begun(tmp_path)
    given = config(tmp_path, "data.manifest=/elsewhere/manifest.json")
    assert find_start(given, resume=True).own_images(given).data.manifest == run / "manifest.json"
    assert Start().own_images(given) == given


# --- damaged records


def cuts(content: bytes) -> list[bytes]:
    """The content cut at many offsets, emptied, and overwritten in part as by a disk that filled up."""
    offsets = sorted({0, 1, len(content) - 1, *range(0, len(content), max(1, len(content) // 25))})
    return [*(content[:at] for at in offsets), b"\0" * len(content), content[: len(content) // 2] + b"\xff\x00{["]


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_a_damaged_record_is_named_and_may_be_removed(tmp_path, name):
    run = begun(tmp_path)
    checkpoint(run, 40)
    whole = (run / name).read_bytes()
    refused = []
    for content in cuts(whole):
        (run / name).write_bytes(content)
        try:
            find_start(config(tmp_path), resume=True)
        except UserError as error:
            refused.append(str(error))
    # All of them but one of JSON whose last line's end alone is missing.
    assert len(refused) >= len(cuts(whole)) - 1
    for message in refused:
        assert str(run / name) in message
        assert "remove it" in message
    (run / name).unlink()
    assert find_start(config(tmp_path), resume=True).step == 40


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
def test_a_damaged_line_is_named_and_half_a_last_line_is_none(tmp_path, name):
    run = begun(tmp_path)
    checkpoint(run, 2)
    rows = [json.dumps({"step": step, "reward": 0.5}).encode() + b"\n" for step in (1, 2, 3)]
    whole = b"".join(rows)
    for at in range(0, len(whole), 9):
        (run / name).write_bytes(whole[:at])
        assert find_start(config(tmp_path), resume=True).step == 2
    for damage in (b"\0" * 20 + b"\n", b'{"step": 2, "rew\n', b'{"step": "two"}\n', b"\xff\n", b"[]\n"):
        (run / name).write_bytes(rows[0] + damage + rows[2])
        with pytest.raises(UserError, match=re.escape(f"{run / name}, line 2 is damaged: remove")):
            find_start(config(tmp_path), resume=True)
    (run / name).write_bytes(rows[0] + rows[2])
    assert find_start(config(tmp_path), resume=True).step == 2


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "checkpoints/step-000040/state.json"])
def test_a_newer_format_is_refused_and_an_older_one_read(tmp_path, name):
    run = begun(tmp_path)
    checkpoint(run, 40)
    read, dump = (yaml.safe_load, yaml.safe_dump) if name.endswith(".yaml") else (json.loads, json.dumps)
    values = read((run / name).read_text())
    assert values.pop("format") == 2
    values.pop("sha256", None)  # older ones had no checksum
    end = CONFIG_END if name.endswith(".yaml") else ""
    (run / name).write_text(dump({"format": 3, **values, "of_another_time": 1}) + end)
    with pytest.raises(UserError, match=r"written by a newer version of rft_cluster: format 3, this one reads up to 2"):
        find_start(config(tmp_path), resume=True)
    values.pop("files", None)  # which format 1 has not
    (run / name).write_text(dump(values))
    assert find_start(config(tmp_path), resume=True).step == 40


@pytest.mark.parametrize(
    "place", ["", "mine", "mine/checkpoints", "mine/rollouts", "mine/model", "mine/model-best"], ids=lambda p: p or "."
)
@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_is_no_folder_is_said_before_anything_starts(tmp_path, place, kind):
    root = tmp_path / "runs"
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if kind == "file" else path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=re.escape(f"{path} is ")):
        check_kinds(config(root).run_folder)
    path.rename(tmp_path / "renamed")
    check_kinds(config(root).run_folder)


NOT_A_FILE = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to(path.parents[1] / "own"),
}


@pytest.mark.parametrize(
    "name", ["config.yaml", "manifest.json", "metrics.jsonl", "eval.jsonl", "log.txt", "activity.json", ".lock"]
)
@pytest.mark.parametrize("kind", NOT_A_FILE)
def test_what_is_no_file_in_a_record_s_place_is_said_and_not_written_through(tmp_path, name, kind):
    run, own = tmp_path / "mine", tmp_path / "own"
    run.mkdir()
    own.write_text("a file of the reader's own")
    NOT_A_FILE[kind](run / name)
    with pytest.raises(UserError, match=re.escape(f"{run / name} is {kind}")):
        check_kinds(config(tmp_path).run_folder)
    if name == ".lock" and kind == "a link":
        with pytest.raises(OSError, match="symbolic links"), locked(run):
            pass
    holder(run)  # a pipe would be waited for
    assert own.read_text() == "a file of the reader's own"
    (run / name).rename(tmp_path / "renamed")
    check_kinds(config(tmp_path).run_folder)


@pytest.mark.parametrize("said", [0, 1, 3, 10**9])
def test_a_checkpoint_that_says_another_step_than_its_name_is_not_whole(tmp_path, said):
    begun(tmp_path)
    checkpoint(tmp_path / "mine", 1)
    rewrite_state(checkpoint(tmp_path / "mine", 2), step=said)
    start = find_start(config(tmp_path), resume=True)
    assert start.step == 1 and f"state.json is of step {said}" in start.notes[0]


@pytest.mark.parametrize("folder", [".", "rose", "runs", "rose/runs"])
@pytest.mark.parametrize("way", ["absolute", "relative", "link"])
def test_a_run_among_the_classes_is_refused_and_the_cure_works(tmp_path, monkeypatch, folder, way):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    (photos / "rose").mkdir(parents=True)
    (tmp_path / "way").symlink_to(photos)
    path = {"absolute": photos, "relative": Path("photos"), "link": Path("way")}[way]
    data = ("data.source=folder", f"data.path={path}")
    with pytest.raises(UserError, match=r"run\.folder: .* lies in data\.path"):
        check_run_folder(config(photos / folder, *data))
    check_run_folder(config(tmp_path / "elsewhere", *data))
    check_run_folder(config(photos / folder, "data.source=csv", f"data.path={path}"))


# --- stopped


def test_the_line_of_a_stopped_run_names_the_step_and_the_command(tmp_path):
    command = ["python", "-m", "rft_cluster.launch", "--config", "digits", "prompt.subject=ripe fruit"]
    none = resume_line(tmp_path / "mine", command)
    assert none == (
        "no step was saved yet; go on with: "
        "python -m rft_cluster.launch --config digits 'prompt.subject=ripe fruit' --resume=auto"
    )
    run = begun(tmp_path)
    for step in (9, 12):
        checkpoint(run, step)
    assert "step 12 is saved; go on with: " in resume_line(run, [*command, "--resume"])
    assert resume_line(run, command).endswith(" --resume")
    cut = checkpoint(run, 15) / "shard-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    checkpoint(run, 16, format=99)
    assert resume_line(run, command).startswith("step 12 is saved; "), "the others are not whole"
    for asked in ("--resume", "--resume=auto"):
        assert resume_line(run, [*command, asked]).endswith(f" {asked}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DiskFull("model: no room"), DiskFull),
        (OSError(errno.ENOSPC, "no room", "step-000007.jsonl"), DiskFull),
        (OSError(errno.ESTALE, "no room for a handle", "step-000007.jsonl"), Unavailable),
        (Unavailable("the hub has no room for one more"), Unavailable),
    ],
)
def test_where_nothing_is_wrong_with_the_input_a_run_that_has_begun_names_the_command_to_go_on(tmp_path, error, kind):
    raise_with_cure(error, tmp_path / "mine", ["launch"])
    checkpoint(begun(tmp_path), 4)
    with pytest.raises(kind, match=r"no room.*\nstep 4 is saved; go on with: launch --resume$"):
        raise_with_cure(error, tmp_path / "mine", ["launch"])


def test_resuming_a_run_that_is_not_there_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match=r"there is no run in .*/mine: Leave --resume out"):
        check_begun(config(tmp_path))
    begun(tmp_path)
    check_begun(config(tmp_path))
    with pytest.raises(UserError, match=r"there is no run in .*/mime: did you mean run.name=mine\? .* --resume=auto"):
        check_begun(config(tmp_path, "run.name=mime"))


def test_the_manifest_of_a_run_that_began_stays(tmp_path):
    run = begun(tmp_path)
    found = json.loads((run / "manifest.json").read_text())
    assert found == {"format": 2, **manifest(DATASET, 0)}
    begun(tmp_path)
    assert json.loads((run / "manifest.json").read_text()) == found


def test_every_kind_of_value_survives_being_saved(tmp_path):
    odd = ["optimizer.learning_rate=1e-6", "algorithm.importance_cap=null", "data.classes=[a,'1',null-like]",
           "optimizer.betas=[0.9,0.95]", "prompt.subject='yes'", "model.path=~/models/x"]  # fmt: skip
    begun(tmp_path, *odd)
    assert find_start(config(tmp_path, *odd), resume=True).step == 0
    assert read_saved_config(tmp_path / "mine" / "config.yaml") == config(tmp_path, *odd)


def test_a_record_of_before_there_were_choices_is_the_same_configuration(tmp_path):
    """Columns had these defaults, and what can be chosen since then was not written."""
    run = begun(tmp_path)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    saved.pop("format")
    saved["data"] |= {"image_column": "image", "label_column": "label"}
    for key in ("only", "splits", "folds", "fold", "sixteen_bit", "on_conflict", "max_pixels", "max_bytes", "images"):
        saved["data"].pop(key)
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    assert find_start(config(tmp_path), resume=True).manifest == run / "manifest.json"
    saved["data"]["label_column"] = "species"
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    assert read_saved_config(run / "config.yaml").data.label_column == "species"
