"""A run's folder read for people: whole, in progress, cut, of an older version, copied, and hostile."""

import json
import os
import shutil
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.history import Loss, read_history
from rft_cluster.run.lock import locked
from tests.unit.run.begun import TASK, begun, config
from tests.unit.run.steps import ADVANTAGES, GROUPS, LEARNER, REWARDS, stats
from tests.unit.test_train import finished


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("done"))


@pytest.fixture
def copied(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "elsewhere" / "other name"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_done_and_was_copied(copied):
    before = contents(copied)
    history = read_history(copied)
    assert (history.name, history.state, history.last, history.steps_due) == ("other name", "done", 6, 6)
    assert [row["step"] for row in history.steps] == [1, 2, 3, 4, 5, 6]
    assert [(row["step"], row["split"]) for row in history.evaluations][:2] == [(0, "test"), (2, "validation")]
    assert history.baselines == {"nearest_neighbour": 0.5}
    assert history.config["schedule"]["prompts_per_step"] == 2
    assert history.manifest is not None and history.manifest["classes"] == ["rose", "tulip"]
    assert history.recorded == (1, 2, 3, 4, 5, 6)
    assert [len(history.rollouts(step)) for step in history.recorded] == [2] * 6
    assert history.rollouts(7) == []
    assert history.problems == () and history.losses == () and history.redone == ()
    assert contents(copied) == before


def test_a_run_in_progress_whose_last_lines_are_half_written(tmp_path):
    records = RunFolder(config(tmp_path), TASK, 0)
    records.log_rollouts(1, GROUPS, REWARDS, ADVANTAGES, LEARNER)
    records.log_step(stats(1))
    records.log_rollouts(2, GROUPS, REWARDS, ADVANTAGES, LEARNER)
    folder = tmp_path / "mine"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "re')
    second = folder / "rollouts" / "step-000002.jsonl"
    second.write_text(second.read_text()[:-10])
    with locked(folder):
        history = read_history(folder)
        assert history.state == "in progress"
    assert (history.last, history.recorded) == (1, (1, 2))
    assert [row["example_id"] for row in history.rollouts(2)] == ["digits/0"]
    assert history.problems == ()
    assert read_history(folder).state == "stopped"


def test_a_run_that_has_nothing_but_a_configuration(tmp_path):
    history = read_history(begun(tmp_path))
    assert (history.last, history.steps, history.evaluations, history.baselines) == (0, (), (), {})
    assert history.log == () and history.recorded == ()


def test_what_cannot_be_read_is_said_and_the_rest_is_there(copied):
    (copied / "config.yaml").write_text("format: 999\n")
    (copied / "manifest.json").write_text("[]")
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    (copied / "metrics.jsonl").write_text("\n".join([lines[0], "no row", *lines[2:]]) + "\n")
    history = read_history(copied)
    assert [row["step"] for row in history.steps] == [1, 3, 4, 5, 6]
    assert (history.config, history.manifest, history.steps_due, history.state) == ({}, None, None, "stopped")
    damaged, version, manifest = history.problems
    assert damaged == "metrics.jsonl, line 2 is damaged"
    assert "a newer version" in version and "not the manifest of a run" in manifest


def test_a_run_of_an_older_version_lacks_keys_and_is_read(copied):
    """Before there were versions in a rollout, splits in an evaluation, and a format in a configuration."""
    file = copied / "rollouts" / "step-000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "version_spans"}) + "\n" for row in rows))
    (copied / "eval.jsonl").write_text('{"step": 0, "accuracy": 0.5}\n{"step": 6, "split": "test"}\n')
    yaml = copied / "config.yaml"
    yaml.write_text("".join(yaml.read_text().splitlines(keepends=True)[1:]))
    history = read_history(copied)
    assert len(history.rollouts(1)) == 2
    assert history.evaluations == ({"step": 6, "split": "test"},)
    assert history.config["run"]["name"] == "mine"


def test_figures_of_a_stranger_s_run_are_numbers(copied):
    (copied / "metrics.jsonl").write_text('{"step": 1, "reward": "high", "kl": 0.5, "x": [1]}\n')
    rows = [{"step": 0, "split": "test", **wrong} for wrong in ({"n": "4"}, {"interval": [0]}, {"interval": ["a", 1]})]
    (copied / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 0, "split": 3}\n')
    history = read_history(copied)
    assert history.steps == ({"step": 1, "kl": 0.5},)
    assert history.evaluations == ()


def test_what_a_record_cannot_hold_is_left_out(copied):
    """Python reads these from JSON, and fails later: in an average, a file's name, a page."""
    vast = "1" + "0" * 400
    figures = f'{{"step": 1, "kl": NaN, "loss": 1e999, "reward": {vast}, "grad_norm": 1e9}}\n'
    (copied / "metrics.jsonl").write_text(f'{figures}{{"step": {vast}}}\n{{"step": -1}}\n')
    wrong = ('"step": 0, "n": NaN', '"step": 0, "interval": [0, 1e999]', f'"step": {vast}', '"step": -1')
    (copied / "eval.jsonl").write_text("".join(f'{{"split": "test", {one}}}\n' for one in wrong))
    (copied / "log.txt").write_text("2026-02-31 03:04:05  no such day\n2026-01-02 03:04:05  a day\n")
    (copied / "rollouts" / "step-000001.jsonl").write_text('{"completions": 3}\n{"completions": []}\n')
    history = read_history(copied)
    assert history.steps == ({"step": 1, "grad_norm": 1e9},)
    assert history.evaluations == ()
    assert history.log == (("2026-01-02 03:04:05", "a day"),)
    assert history.rollouts(1) == [{"completions": []}]


def test_losses_are_read_from_the_log_with_what_was_done(copied):
    lines = [
        "WARNING: step 4 is not saved, and the run goes on: learner-0 died",
        "WARNING: learner-0 died while 'update'",
        "the learners start afresh (1 of 3 times without a new step)",
        "WARNING: runs/x is damaged: its step and those after it are generated again",
        "step 5/80  reward 1.11",
        "WARNING: generator did not answer",
        "in time",
        "generator starts once more",
    ]
    text = "".join(f"2026-01-02 03:04:0{second}  {line}\n" for second, line in enumerate(lines))
    (copied / "log.txt").write_text(f"no time\n{text}", errors="surrogateescape")
    history = read_history(copied)
    assert len(history.log) == 8
    first = Loss("2026-01-02 03:04:01", "learner-0 died while 'update'", lines[2])
    assert history.losses == (first, Loss("2026-01-02 03:04:05", "generator did not answer", lines[7]))


def test_steps_that_were_done_again(copied):
    aside = copied / "redone-20260102-030405"
    aside.mkdir()
    (aside / "metrics.jsonl").write_text('{"step": 6}\n{"step": 5}\n')
    assert read_history(copied).redone == (5, 6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("elsewhere", "is not the folder of a run. It holds runs: other name"),
        ("elsewhere/othername", r"there is no folder .*\. Did you mean .*other name\?"),
        ("elsewhere/other name/rollouts", "is not the folder of a run"),
    ],
)
def test_what_is_no_run_is_refused_and_the_nearest_named(copied, name, said):
    with pytest.raises(UserError, match=said):
        read_history(copied.parent.parent / name)


def test_a_pipe_or_a_link_in_place_of_a_file_is_refused(copied, tmp_path):
    os.mkfifo(copied / "log.txt")  # reading one would wait for ever
    with pytest.raises(UserError, match="a pipe"):
        read_history(copied)
    (copied / "log.txt").unlink()
    secret = tmp_path / "secret"
    secret.write_text('{"completions": ["secret"]}\n')
    step = copied / "rollouts" / "step-000001.jsonl"
    step.unlink()
    step.symlink_to(secret)
    assert read_history(copied).rollouts(1) == []
