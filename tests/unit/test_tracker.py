import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rft_cluster.classification.report import Evaluation
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.messages import Completion, Example, Group, Prompt, Reward
from rft_cluster.prompts import text_hash
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.metrics import Stopwatch, clock, step_line, step_metrics
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


# --- the figures of a step


def test_a_step_by_hand():
    assert step_metrics(GROUPS, REWARDS, LEARNER, SECONDS) == pytest.approx(
        {
            "reward": 0.75,  # (1 + 2 + 0 + 0) / 4
            "reward/format": 0.5,
            "reward/accuracy": 0.25,
            "reward_failures": 0,
            "live_groups": 0.5,
            "logprob_gap": 0.05,  # 0.4 / 8 tokens, as the next four
            "kl": 0.1,
            "entropy": 2.0,
            "importance": 1.0,
            "clipped": 0.25,
            "loss": -0.5,
            "grad_norm": 1.5,
            "learning_rate": 1e-4,
            "skipped": 0.0,
            "completion_tokens": 4.0,  # (3 + 5 + 4 + 4) / 4
            "cut_short": 0.25,
            "oldest_version": 6,
            "tokens": 16,
            "tokens_trained": 8.0,
            "tokens_per_second": 4.0,  # 16 / (2 + 0 + 1.5 + 0.5)
            "seconds/generate": 2.0,
            "seconds/score": 0.0,
            "seconds/learn": 1.5,
            "seconds/transfer": 0.5,
        }
    )


def test_a_step_without_an_update_has_no_learner_figures():
    metrics = step_metrics(GROUPS, REWARDS, {}, SECONDS)
    assert metrics["tokens_trained"] == 0
    assert metrics["reward"] == 0.75
    assert not {"logprob_gap", "kl", "loss", "learning_rate"} & set(metrics)


# The second group's rewards: one of one's own failed on the one, both on the other.
MASKED = [
    REWARDS[0],
    [
        Reward(None, {"format": 1.0}, {"accuracy": "no answer within 10 s"}),
        Reward(None, {}, {"accuracy": "returned nan", "format": "KeyError"}),
    ],
]


def test_masked_completions_are_counted_and_in_no_mean():
    metrics = step_metrics(GROUPS, MASKED, LEARNER, SECONDS)
    assert (metrics["reward"], metrics["reward/format"], metrics["reward/accuracy"]) == (1.5, 1.0, 0.5)
    assert metrics["live_groups"] == 0.5
    failures = {name: value for name, value in metrics.items() if name.startswith("reward_failures")}
    assert failures == {"reward_failures": 2, "reward_failures/accuracy": 2, "reward_failures/format": 1}
    line = step_line(8, 120, metrics, seconds_left=5)
    assert "reward 1.50 (format 1.00 accuracy 0.50; 2 completions without: accuracy 2 format 1 failed)" in line
    assert "without" not in step_line(8, 120, step_metrics(GROUPS, REWARDS, LEARNER, SECONDS), seconds_left=5)


def test_every_figure_is_finite_json():
    for learner in (LEARNER, {}, {**dict.fromkeys(LEARNER, 0.0)}):
        json.dumps(step_metrics(GROUPS, REWARDS, learner, SECONDS), allow_nan=False)


def test_the_line_of_a_step():
    line = step_line(8, 120, step_metrics(GROUPS, REWARDS, LEARNER, SECONDS), seconds_left=3725)
    assert "\n" not in line
    assert line.startswith("step   8/120 ")
    for part in (
        *("reward 0.75", "format 0.50", "accuracy 0.25", "live 0.50", "gap 0.0500", "4 tok/s"),
        *("generate 50%", "score 0%", "learn 38%", "transfer 12%", "1:02:05 left"),  # of 4 s
    ):
        assert part in line


def test_the_line_of_a_step_without_an_update_says_so():
    line = step_line(8, 120, step_metrics(GROUPS, REWARDS, {}, SECONDS), seconds_left=5)
    assert "no live group: no update" in line
    assert "gap" not in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (5, "0:05"), (59.6, "1:00"), (65, "1:05"), (3599, "59:59"), (3725, "1:02:05"), (360000, "100:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_stopwatch_adds_up():
    watch = Stopwatch()
    for _ in range(2):
        with watch("learn"):
            pass
    with watch("score"):
        pass
    assert list(watch.seconds) == ["learn", "score"]
    assert all(0 <= value < 1 for value in watch.seconds.values())


# --- the run folder


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


# --- where to begin


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


def test_every_kind_of_value_survives_being_saved(tmp_path):
    odd = ["optimizer.learning_rate=1e-6", "algorithm.importance_cap=null", "data.classes=[a,'1',null-like]",
           "optimizer.betas=[0.9,0.95]", "prompt.subject='yes'", "model.path=~/models/x"]  # fmt: skip
    begun(tmp_path, *odd)
    assert first_step_of(config(tmp_path, *odd), TASK, resume=True) == (0, None)
