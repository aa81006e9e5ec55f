import json
from pathlib import Path

import pytest
import yaml

from rft_cluster.classification.report import Evaluation
from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.messages import Completion, Example, Group, Prompt, Reward
from rft_cluster.prompts import text_hash
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.metrics import clock
from rft_cluster.run.resume import first_step_of
from rft_cluster.run.task import Task

EXAMPLES = [Example("a", b"one", "rose"), Example("b", b"two", "tulip")]
DATASET = FewShotDataset("photos", ["rose", "tulip"], EXAMPLES, [], [], [])
TASK = Task(DATASET, "Which flower?")


def completion(length: int, finish_reason: str = "stop", version: int = 7) -> Completion:
    return Completion([5] * length, [-0.5] * length, "<think>ä</think>", finish_reason, version)


def group(number: int, *completions: Completion) -> Group:
    prompt = Prompt(f"train/7/{number}", f"digits/{number}", b"", "Which digit?", "seven", 0)
    return Group(prompt, [1, 2], list(completions))


def reward(format_part: float, accuracy_part: float) -> Reward:
    return Reward(format_part + accuracy_part, {"format": format_part, "accuracy": accuracy_part})


# One group of different rewards, one of equal ones; one completion was cut short, one is a version older.
GROUPS = [
    group(0, completion(3), completion(5, "length", version=6)),
    group(1, completion(4), completion(4)),
]
REWARDS = [[reward(1, 0), reward(1, 1)], [reward(0, 0), reward(0, 0)]]
LEARNER = {
    **{"tokens": 8.0, "logprob_gap": 0.4, "kl": 0.8, "entropy": 16.0, "importance": 8.0, "clipped": 2.0},
    **{"loss": -0.5, "grad_norm": 1.5, "learning_rate": 1e-4, "skipped": 0.0},
}
SECONDS = {"generate": 2.0, "score": 0.0, "learn": 1.5, "transfer": 0.5}


def config(folder: Path, *overrides: str) -> Config:
    return load_config("digits", [f"run.folder={folder}", "run.name=mine", *overrides])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_s_records(tmp_path, capsys):
    run = RunFolder(config(tmp_path), TASK, 0)
    run.log_evaluation(Evaluation(0, "test", 0.25, 0.3, 0.5, 40, (0.1, 0.4)))
    run.log_step(1, GROUPS, REWARDS, LEARNER, SECONDS)
    run.log_step(2, GROUPS, REWARDS, {}, {"generate": 2.0})
    folder = tmp_path / "mine"
    assert Config.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == config(tmp_path)
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2]
    assert rows(folder / "metrics.jsonl")[0]["logprob_gap"] == pytest.approx(0.05)
    (evaluation,) = rows(folder / "eval.jsonl")
    assert evaluation == {
        **{"step": 0, "split": "test", "accuracy_strict": 0.25, "accuracy_lenient": 0.3},
        **{"format_rate": 0.5, "n": 40, "interval": [0.1, 0.4]},
    }
    first, second = rows(folder / "rollouts" / "step-000001.jsonl")
    assert first.pop("policy_version") in (6, 7)
    assert first == {
        "prompt_id": "train/7/0",
        "example_id": "digits/0",
        "label": "seven",
        "completions": ["<think>ä</think>"] * 2,
        "rewards": [
            {"total": 1, "parts": {"format": 1, "accuracy": 0}, "failures": {}},
            {"total": 2, "parts": {"format": 1, "accuracy": 1}, "failures": {}},
        ],
    }
    assert second["prompt_id"] == "train/7/1"
    shown = capsys.readouterr().out.splitlines()
    assert (
        shown[0] == "test accuracy 25.0 % (95 % interval 10.0 to 40.0, 40 images; leniently 30.0 %), "
        "format 50.0 %, after 0 steps"
    )
    # 79 steps of 4 s are left; then 78 of (4 + 2) / 2 s
    assert shown[1].endswith(f"{clock(79 * 4)} left")
    assert shown[2].endswith(f"{clock(78 * 3)} left")


def test_resuming_drops_what_will_be_done_again(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5, "re')
    (folder / "eval.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n')
    run = RunFolder(config(tmp_path), TASK, 2)
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in rows(folder / "eval.jsonl")] == [0, 2]
    run.log_step(3, GROUPS, REWARDS, LEARNER, SECONDS)
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2, 3]
    assert not list(folder.glob("*.tmp"))


def test_a_half_written_last_line_goes_even_where_nothing_is_done_again(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2')
    RunFolder(config(tmp_path), TASK, 2)
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_run_resumed_from_its_start_evaluates_once(tmp_path):
    # It died before its first checkpoint: version 0 will be evaluated again.
    RunFolder(config(tmp_path), TASK, 0).log_evaluation(Evaluation(0, "test", 0.25, 0.3, 0.5, 40, (0.1, 0.4)))
    RunFolder(config(tmp_path), TASK, 0).log_evaluation(Evaluation(0, "test", 0.25, 0.3, 0.5, 40, (0.1, 0.4)))
    assert len(rows(tmp_path / "mine" / "eval.jsonl")) == 1


def begun(folder: Path, *overrides: str) -> Path:
    return RunFolder(config(folder, *overrides), TASK, 0).path


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    path = run / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    if complete:
        (path / "state.json").write_text(json.dumps({"step": step, "prompt_sha256": text_hash("Which flower?")}))
    return path


def test_every_kind_of_value_survives_being_saved(tmp_path):
    odd = ["optimizer.learning_rate=1e-6", "algorithm.importance_cap=null", "data.classes=[a,'1',null-like]",
           "optimizer.betas=[0.9,0.95]", "prompt.subject='yes'", "model.path=~/models/x"]  # fmt: skip
    begun(tmp_path, *odd)
    assert first_step_of(config(tmp_path, *odd), TASK, resume=True) == (0, None)
