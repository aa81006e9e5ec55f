"""Each hint, of a run's folder that gives rise to it, and none of one that is near to it."""

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from rft_cluster.classification.intervals import wilson
from rft_cluster.classification.report import Judged
from rft_cluster.common.files import write_json
from rft_cluster.report import hints as module
from rft_cluster.report.hints import CHECKS, Hint, hints
from rft_cluster.run.answers import write_answers
from rft_cluster.run.history import read_history
from tests.unit.run.begun import begun

CLASSES = ("rose", "tulip")  # of `begun`
# A step of a healthy run; a figure may be a function of the step.
STEP: dict[str, Any] = {
    **{
        "reward": lambda step: 1.1 + step / 100,
        "reward/format": 0.97,
        "reward/accuracy": lambda step: 0.1 + step / 160,
    },
    **{"reward_failures": 0, "live_groups": 0.7, "logprob_gap": 0.001, "kl": 0.3, "entropy": 0.45, "cut_short": 0.0},
    **{"staleness": 0.0, "skipped": 0, "replayed": False, "tokens": 1000},
    **{"seconds/generate": 0.2, "seconds/learn": 0.2, "seconds/transfer": 0.03},
}
BASELINES = {"nearest_neighbour": 0.8}
RIGHT = {0: 0.5, 20: 0.7, 40: 0.85, 60: 0.85, 80: 0.86}  # accuracy by step


def answers(right: float, images: int) -> list[Judged]:
    """Alternating labels, of which the first ones are answered rightly, and the others taken for the other class."""
    judged = []
    for number in range(images):
        label, other = CLASSES[number % 2], CLASSES[1 - number % 2]
        said = label if number < round(right * images) else other
        judged.append(Judged(f"{number}", label, said, said, said == label, said == label, True))
    return judged


def run_folder(
    folder: Path,
    steps: int = 80,
    figures: Mapping[str, Any] = MappingProxyType({}),
    right: Mapping[int, float] = RIGHT,
    images: int = 200,
    baselines: Mapping[str, float] = BASELINES,
    judged: list[Judged] | None = None,
    rollouts: list[dict] | None = None,
) -> Path:
    """A run's folder, as a healthy run leaves it but for what is given. `judged`: of the last evaluation."""
    run = begun(folder)
    rows = [
        {"step": step} | {key: value(step) if callable(value) else value for key, value in {**STEP, **figures}.items()}
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = [(step, split, rate) for step, rate in right.items() for split in ("validation", "test")]
    lines = []
    for step, split, rate in evaluated:
        interval = wilson(round(rate * images), images)
        row = {"step": step, "split": split, "accuracy_strict": rate, "n": images, "interval": interval}
        lines.append(json.dumps(row) + "\n")
        if step == evaluated[-1][0]:
            write_answers(run, step, split, answers(rate, images))
    (run / "eval.jsonl").write_text("".join(lines))
    if judged is not None:
        write_answers(run, evaluated[-1][0], "test", judged)
    write_json(run / "baselines.json", dict(baselines))
    for step in range(steps - 19, steps + 1) if rollouts else ():
        (run / "rollouts" / f"step-{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    return run


def found(folder: Path, **changes: Any) -> list[Hint]:
    return hints(read_history(run_folder(folder, **changes)))


def group(*accuracy: float) -> dict:
    rewards = [{"total": 1 + one, "parts": {"format": 1.0, "accuracy": one}, "failures": {}} for one in accuracy]
    return {"example_id": "a", "label": "rose", "completions": ["x"] * len(accuracy), "rewards": rewards}


DAMAGED = {"completions": ["x"], "rewards": 5}


def said(number: int, label: str, answer: str | None) -> Judged:
    return Judged(str(number), label, "", answer, answer == label, answer == label, True)


def after(step: int, then: float, before: float) -> Any:
    return lambda now: then if now > step else before


def mostly(answer: str, share: int) -> list[Judged]:
    """Of 200 images, 20 of each of ten classes, `share` are given the answer; the others the label."""
    labels = [f"class {number % 10}" for number in range(200)]
    own = labels.count(answer)
    others = [number for number, label in enumerate(labels) if label != answer][: share - own]
    return [said(number, label, answer if number in others else label) for number, label in enumerate(labels)]


# Of each check: a run that gives rise to it, what is said of it, and runs near to it of which the check says nothing.
CASES: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "dead_groups": (
        {"figures": {"live_groups": 0.59}, "rollouts": [group(1, 1), group(0, 0), group(0, 1), DAMAGED]},
        "41 % of groups teach nothing: all right or all wrong (20 all right, 20 all wrong), in the last 20 steps",
        [
            {"figures": {"live_groups": 0.61}},
            {"figures": {"live_groups": after(60, 0.7, 0.0)}},
            {"steps": 19, "figures": {"live_groups": 0.5}},
        ],
    ),
    "one_answer": (
        {"judged": mostly("class 3", 62)},
        "The policy answers 'class 3' to 31 % of test images, and it is the label of 10 %, after step 80",
        [
            {"judged": mostly("class 3", 44)},
            {"right": {0: 0.1}, "judged": mostly("class 3", 150)},
            {"judged": []},
            {"judged": [said(number, "rose", None) for number in range(9)]},
        ],
    ),
    "never_answered": (
        {"judged": [said(number, "rose", "rose" if number > 6 else "lily") for number in range(40)]
         + [said(number, "tulip", "rose") for number in range(50, 56)]},
        "'tulip': never answered, after step 80, to 6 test images of it",
        [
            {"judged": [said(0, "tulip", "tulip"), *(said(number, "tulip", "rose") for number in range(1, 9))]},
            {"judged": [said(number, "tulip", "rose") for number in range(4)]},
        ],
    ),
    "accuracy_fell": (
        {"right": {0: 0.5, 60: 0.87, 80: 0.7}, "figures": {"reward/length": after(60, 0.9, 0.2)}},
        "Accuracy fell since step 60, from 87 % to 70 % of validation images, "
        "while reward rose by 0.20: look at length",
        [{"right": {0: 0.5, 60: 0.87, 80: 0.8}}, {"right": {80: 0.7}}],
    ),
    "overfitted": (
        {"figures": {"reward/accuracy": 0.95}, "right": {0: 0.5, 80: 0.7}},
        "95 % of the answers to training images are right, but 70 % of those to test images",
        [{"figures": {"reward/accuracy": 0.95}, "right": {0: 0.5, 80: 0.84}}, {"figures": {"reward/accuracy": None}}],
    ),
    "by_chance": (
        {"right": {0: 0.5, 40: 0.54}},
        "Accuracy is 54 % of 200 validation images after step 40: guessing gives 50 %",
        [{"right": {0: 0.5, 40: 0.7}}, {"right": {0: 0.5, 39: 0.5}}],
    ),
    "beaten": (
        {"baselines": {"nearest_neighbour": 0.5, "logistic_regression": 0.92}},
        "Logistic regression on pixels is right on 92 % of the test images, the trained model on 86 %",
        [{"baselines": {"nearest_neighbour": 0.9}}, {"baselines": {}}],
    ),
    "too_few_images": (
        {"images": 40, "baselines": {}},
        "40 validation images are too few to tell: 86 % may be 71 % to 93 %",
        [{"images": 100, "baselines": {}}],
    ),
    "cut_short": (
        {"figures": {"cut_short": 0.06}, "steps": 5},
        "6 % of completions were cut at max_tokens (16), in the last 5 steps",
        [{"figures": {"cut_short": 0.04}}, {"figures": {"cut_short": 1.0}, "steps": 4}],
    ),
    "format_lost": (
        {"figures": {"reward/format": after(60, 0.81, 0.98)}},
        "The format fell from 98 % to 81 % of completions",
        [{"figures": {"reward/format": after(60, 0.89, 0.98)}}, {"figures": {"reward/format": 0.5}}],
    ),
    "high_gap": (
        {"figures": {"logprob_gap": 0.06}},
        "The log-prob gap is 0.060 nats a token, in the last 20 steps",
        [
            {"figures": {"logprob_gap": 0.04}},
            {"figures": {"logprob_gap": 0.3, "staleness": 0.9}},
            {"figures": {"logprob_gap": None}},
        ],
    ),
    "high_kl": (
        {"figures": {"kl": 1.1}},
        "The KL from the starting model is 1.1 nats a token, in the last 20 steps",
        [{"figures": {"kl": 0.9}}],
    ),
    "entropy_gone": (
        {"figures": {"entropy": after(20, 0.01, 0.5), "reward/accuracy": 0.4}},
        "The entropy fell from 0.5 to 0.01 nats a token, and only 40 % of answers are right",
        [
            {"figures": {"entropy": after(20, 0.06, 0.5), "reward/accuracy": 0.4}},
            {"figures": {"entropy": after(20, 0.01, 0.5), "reward/accuracy": 0.91}},
        ],
    ),
    "failed_rewards": (
        {"figures": {"reward_failures": 2, "reward_failures/judges:slow": 2}},
        "160 of 12800 completions have no reward: judges:slow on 160 failed",
        [
            {"figures": {"reward_failures": 1, "reward_failures/judges:slow": 1}},
            {"figures": {"reward_failures": 2, "reward_failures/judges:slow": 2, "groups": 80}},  # further prompts
        ],
    ),
    "skipped_updates": (
        {"figures": {"skipped": lambda step: int(step == 7)}},
        "1 update was left out: the gradient was infinite or not a number",
        [{"figures": {"skipped": None}}],
    ),
    "idle": (
        {"figures": {"seconds/generate": 0.8}},
        "78 % of the time is generate: the learners are idle so long",
        [
            {"figures": {"seconds/generate": 0.6}},
            {"figures": {"seconds/generate": 9.0, "replayed": after(60, True, False)}},
        ],
    ),
}  # fmt: skip


def test_a_healthy_run_has_no_hint_at_any_step(tmp_path):
    history = read_history(run_folder(tmp_path))
    assert hints(history) == []
    for steps in range(len(history.steps)):
        assert hints(replace(history, steps=history.steps[:steps])) == [], f"after step {steps}"


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_real_runs_of_the_digits_have_no_hint_at_any_step(tmp_path, seed):
    """Figures of `make demo SEED=...` on two cores; such a run ends at 84 to 91 %."""
    real = json.loads(gzip.decompress((Path(__file__).parent / "digits.json.gz").read_bytes()))[seed]
    history = replace(read_history(begun(tmp_path)), baselines=real["baselines"])
    for step in range(81):
        steps, evaluations = ([row for row in real[name] if row["step"] <= step] for name in ("steps", "evaluations"))
        assert hints(replace(history, steps=tuple(steps), evaluations=tuple(evaluations))) == [], f"after step {step}"


def test_what_is_as_it_should_be_in_sft_is_no_hint(tmp_path):
    figures = {"entropy": after(20, 0.01, 0.5), "seconds/learn": 9.0, "reward": None, "reward/accuracy": None}
    history = read_history(run_folder(tmp_path, figures=figures))
    assert len(hints(history)) == 2
    algorithm = {**history.config["algorithm"], "objective": "sft"}
    assert hints(replace(history, config={**history.config, "algorithm": algorithm})) == []


def test_every_check_has_a_case():
    assert {check.__name__ for check in CHECKS} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_gives_rise_to_it_and_runs_near_to_it(tmp_path, name):
    changes, text, near = CASES[name]
    check = getattr(module, name)
    hint = check(read_history(run_folder(tmp_path / "run", **changes)))
    assert hint is not None and hint.text == text
    assert len(hint.cure) > 20 and re.search(r"[Aa]bove|[Bb]elow|[Ww]ith|[Oo]ne |points|overlap|[Cc]hance", hint.why)
    for number, others in enumerate(near):
        assert check(read_history(run_folder(tmp_path / str(number), **others))) is None, others


@pytest.mark.parametrize(
    ("rollouts", "told"),
    [([group(1, 1)], "all right, in"), ([group(0, 0)], "all wrong, in"), ([], "all rewards equal, in")],
)
def test_groups_of_one_kind_are_called_so(tmp_path, rollouts, told):
    (hint,) = found(tmp_path, figures={"live_groups": 0.3}, rollouts=rollouts)
    assert told in hint.text


@pytest.mark.parametrize(
    ("stage", "told"), [("learn", "learn: the generators are idle"), ("transfer", "transfer: all actors are idle")]
)
def test_each_stage_may_be_the_long_one(tmp_path, stage, told):
    (hint,) = found(tmp_path, figures={f"seconds/{stage}": 2.0})
    assert told in hint.text


@pytest.mark.parametrize(("evaluations", "told"), [(10, 0.02), (50, 0.07)])
def test_a_fall_of_accuracy_is_as_rare_by_chance_as_the_hint_says(evaluations, told):
    """Evaluations of one policy that is right on 0.7 of all images, each on 100 other ones."""
    ends = [wilson(right, 100) for right in range(101)]
    drawn = np.random.default_rng(0).binomial(100, 0.7, (5000, evaluations))
    apart = [ends[own[-1]][1] < ends[own.max()][0] for own in drawn]
    assert sum(apart) / len(apart) == pytest.approx(told, abs=0.01)


def test_warnings_come_first(tmp_path):
    several = found(tmp_path, figures={"kl": 2.0, "live_groups": 0.1, "cut_short": 0.5})
    assert [hint.severity for hint in several] == ["warning", "warning", "note"]


def test_names_are_on_one_line_and_control_no_terminal(tmp_path):
    label = "\x1b[31mred\n\u202e" + "x" * 100
    judged = [said(number, label, label if number % 2 else "rose") for number in range(100)]
    judged += [said(number, "rose", label) for number in range(100, 200)]
    judged += [said(number, f"tulip\x00 {number % 2}", label) for number in range(200, 260)]
    several = found(tmp_path, judged=judged, figures={"reward_failures": 9, "reward_failures/a\x1b[0m:b": 9})
    assert len(several) == 3
    for hint in several:
        assert not re.search(r"[\x00-\x1f\u202e]", hint.text + hint.cure)


def test_damaged_answers_and_a_config_of_another_version_give_no_hint(tmp_path):
    run = run_folder(tmp_path, judged=mostly("class 3", 150))
    file = run / "evaluations" / "step-000080-test.jsonl"
    file.write_text(file.read_text() + "{\n")
    (run / "config.yaml").write_text("format: 2\nother: 1\n# end\n")
    (run / "manifest.json").unlink()
    assert hints(read_history(run)) == []
