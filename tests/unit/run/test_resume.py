import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.messages import Example
from rft_cluster.prompts import text_hash
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.resume import first_step_of
from rft_cluster.run.task import Task

EXAMPLES = [Example("a", b"one", "rose"), Example("b", b"two", "tulip")]
DATASET = FewShotDataset("photos", ["rose", "tulip"], EXAMPLES, [], [], [])
TASK = Task(DATASET, "Which flower?")


def config(folder: Path, *overrides: str) -> Config:
    return load_config("digits", [f"run.folder={folder}", "run.name=mine", *overrides])


def begun(folder: Path, *overrides: str) -> Path:
    return RunFolder(config(folder, *overrides), TASK, 0).path


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    path = run / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    if complete:
        (path / "state.json").write_text(json.dumps({"step": step, "prompt_sha256": text_hash("Which flower?")}))
    return path


def test_a_new_run_begins_at_zero_and_nothing_is_written(tmp_path):
    for resume in (False, True):
        assert first_step_of(config(tmp_path), TASK, resume) == (0, None)
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_not_overwritten(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'mine'} exists: add --resume")):
        first_step_of(config(tmp_path), TASK, resume=False)


def test_a_run_without_a_checkpoint_begins_again(tmp_path):
    begun(tmp_path)
    assert first_step_of(config(tmp_path), TASK, resume=True) == (0, None)


def test_the_newest_complete_checkpoint_is_picked(tmp_path):
    run = begun(tmp_path)
    for step in (40, 100, 9):
        checkpoint(run, step)
    checkpoint(run, 120, complete=False)
    (run / "checkpoints" / "step-000140.tmp").mkdir()
    assert first_step_of(config(tmp_path), TASK, resume=True) == (100, run / "checkpoints" / "step-000100")


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("optimizer.learning_rate=1e-5", "optimizer"),
        ("schedule.prompts_per_step=3", "schedule"),
        ("data.shots=2", "data"),
        ("sampling.temperature=0.5", "sampling"),
        ("model.freeze_vision=true", "model"),
        ("algorithm.importance_cap=null", "algorithm"),
        ("run.seed=1", "seed"),  # another seed draws other images for training and for the test
    ],
)
def test_a_run_is_resumed_with_its_own_configuration(tmp_path, override, section):
    checkpoint(begun(tmp_path), 40)
    with pytest.raises(UserError, match=rf"was begun with another configuration: .*{section}"):
        first_step_of(config(tmp_path, override), TASK, resume=True)


def test_a_run_is_resumed_with_its_own_prompt_and_images(tmp_path):
    checkpoint(begun(tmp_path), 40)
    with pytest.raises(UserError, match="another prompt"):
        first_step_of(config(tmp_path), Task(DATASET, "Which tree?"), resume=True)
    changed = replace(DATASET, train=[EXAMPLES[0], Example("b", b"2", "tulip")])
    with pytest.raises(UserError, match="train: b: its bytes have changed"):
        first_step_of(config(tmp_path), Task(changed, "Which flower?"), resume=True)


@pytest.mark.parametrize(
    "override", ["learners.count=1", "learners.micro_batch_tokens=400", "generators.count=2", "cluster.step_timeout=60"]
)
def test_where_it_runs_may_change(tmp_path, override):
    run = begun(tmp_path)
    checkpoint(run, 40)
    assert first_step_of(config(tmp_path, override), TASK, resume=True) == (40, run / "checkpoints" / "step-000040")
