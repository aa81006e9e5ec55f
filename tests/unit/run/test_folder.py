import json
from dataclasses import replace
from pathlib import Path

import pytest

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.config import load_config
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.messages import Completion, Group
from rft_cluster.prompts import Question
from rft_cluster.run.answers import read_answers
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.metrics import clock
from rft_cluster.run.resume import read_saved_config
from rft_cluster.run.task import Task
from tests.unit.run.begun import EXAMPLES, TASK, config
from tests.unit.run.steps import ADVANTAGES, GROUPS, LEARNER, REWARDS, group, stats

TEXT = "<think>red</think><answer>dog rose</answer>"
ROSES = FewShotDataset.of("photos", ["rose", "tulip"], [replace(EXAMPLES[0], aliases=("dog rose",))], [], [], [])


def answered(number: int, label: str, aliases: tuple[str, ...] = ()) -> Group:
    one = group(number, Completion([5], [-0.5], TEXT, "stop", 0), Completion([6], [-0.5], "second", "stop", 0))
    example = replace(one.prompt.example, label=label, aliases=aliases)
    return replace(one, prompt=replace(one.prompt, example=example))


ANSWERED = [answered(0, "rose", ("dog rose",)), answered(1, "tulip")]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_s_records(tmp_path, capsys):
    run = RunFolder(config(tmp_path), Task(ROSES, Question("Which flower?")), 0)
    run.log_evaluation(Evaluation(0, "test", 0.25, 0.3, 0.5, 40, (0.1, 0.4)), ANSWERED)
    run.log_rollouts(1, GROUPS, REWARDS, ADVANTAGES, LEARNER)
    run.log_step(stats(1))
    run.log_step(stats(2, learned=None, seconds={"generate": 2.0}))
    folder = tmp_path / "mine"
    assert read_saved_config(folder / "config.yaml") == load_config(str(folder / "config.yaml"), []) == config(tmp_path)
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2]
    assert rows(folder / "metrics.jsonl")[0]["logprob_gap"] == pytest.approx(0.05)
    (evaluation,) = rows(folder / "eval.jsonl")
    assert evaluation == {
        **{"step": 0, "split": "test", "accuracy_strict": 0.25, "accuracy_lenient": 0.3},
        **{"format_rate": 0.5, "n": 40, "interval": [0.1, 0.4]},
    }
    assert read_answers(folder, 0, "test") == [
        Judged("digits/0", "rose", TEXT, "rose", strict=True, lenient=True, formatted=True),
        Judged("digits/1", "tulip", TEXT, "rose", strict=False, lenient=False, formatted=True),
    ]
    first, second = rows(folder / "rollouts" / "step-000001.jsonl")
    assert first == {
        "prompt_id": "train/7/0",
        "example_id": "digits/0",
        "label": "seven",
        "completions": ["<think>ä</think>"] * 2,
        "version_spans": [[[7, 3]], [[6, 5]]],
        "rewards": [
            {"total": 1, "parts": {"format": 1, "accuracy": 0}, "failures": {}},
            {"total": 2, "parts": {"format": 1, "accuracy": 1}, "failures": {}},
        ],
        "advantages": [-0.7, 0.7],
        "tokens": [3, 5],
        "finish_reasons": ["stop", "length"],
        "logprob_gaps": [0.25, None],
        "why": [
            "no answer block, label 'seven'; format ok",
            "no answer block, label 'seven'; format ok; cut at max_tokens",
        ],
    }
    assert second["prompt_id"] == "train/7/1"
    assert second["why"] == ["no answer block, label 'seven'; format: no <answer>"] * 2
    shown = capsys.readouterr().out.splitlines()
    assert (
        shown[0] == "test accuracy 25.0 % (95 % interval 10.0 to 40.0, 40 images; leniently 30.0 %), "
        "format 50.0 %, after 0 steps"
    )
    # 79 steps of 4 s are left; then 78 of (4 + 2) / 2 s
    assert shown[1].endswith(f"{clock(79 * 4)} left")
    assert shown[2].endswith(f"{clock(78 * 3)} left")


def records(folder: Path) -> None:
    """Metrics of four steps, and half of a fifth line."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5, "re')
    (folder / "eval.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n')
    (folder / "evaluations").mkdir()
    for name in ("step-000000-test", "step-000002-validation", "step-000004-validation"):
        (folder / "evaluations" / f"{name}.jsonl").touch()
    for step in (1, 2, 3, 4, 5):
        (folder / "rollouts" / f"step-{step:06d}.jsonl").write_text(f"{step}\n")


def test_what_will_be_done_again_is_moved_aside_and_said(tmp_path, capsys):
    folder = tmp_path / "mine"
    records(folder)
    run = RunFolder(config(tmp_path), TASK, 2)
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in rows(folder / "eval.jsonl")] == [0, 2]
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == ["step-000001.jsonl", "step-000002.jsonl"]
    (aside,) = folder.glob("redone-*")
    assert [row["step"] for row in rows(aside / "metrics.jsonl")] == [3, 4]
    assert [row["step"] for row in rows(aside / "eval.jsonl")] == [4]
    assert (aside / "rollouts" / "step-000005.jsonl").read_text() == "5\n"
    kept, moved = (sorted(path.name for path in (where / "evaluations").iterdir()) for where in (folder, aside))
    assert kept == ["step-000000-test.jsonl", "step-000002-validation.jsonl"]
    assert moved == ["step-000004-validation.jsonl"]
    assert f"steps 3 to 5 are done again; their records are in {aside}" in capsys.readouterr().out
    run.log_step(stats(3))
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2, 3]
    assert not list(folder.glob("*.tmp"))


def test_where_nothing_is_done_again_nothing_is_moved(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    whole = '{"step": 1}\n{"step": 2}'
    for left in ("", "\n", '\n{"step": 2', "\n\0\0\0"):
        (folder / "metrics.jsonl").write_text(whole + left)
        RunFolder(config(tmp_path), TASK, 2)
        assert (folder / "metrics.jsonl").read_text() == whole + "\n"
    assert not list(folder.glob("redone-*"))
    assert capsys.readouterr().out == ""


def test_an_evaluation_on_record_is_found_again(tmp_path):
    run = RunFolder(config(tmp_path), TASK, 0)
    evaluation = Evaluation(0, "test", 0.25, 0.3, 0.5, 40, (0.1, 0.4))
    assert run.evaluation(0, "test") is None
    run.log_evaluation(evaluation, ANSWERED)
    again = RunFolder(config(tmp_path), TASK, 0)
    assert again.evaluation(0, "test") == evaluation
    assert again.evaluation(0, "validation") is None
    assert again.evaluation(1, "test") is None
    (run.path / "eval.jsonl").write_text('{"step": 0, "split": "test", "accuracy_strict": 0.5}\n')  # of another version
    assert again.evaluation(0, "test") is None
