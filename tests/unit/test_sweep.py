import json
import signal
import subprocess
import time
from pathlib import Path
from sys import executable
from types import SimpleNamespace

import psutil
import pytest
import yaml

from rft_cluster import sweep
from rft_cluster.classification.repeats import Repeat
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.run.folder import read_evaluations
from rft_cluster.run.history import read_history
from tests.unit.test_train import finished

FILE = """
name: shots
config: digits
overrides: [schedule.steps=2, optimizer.warmup_steps=0]
grid:
  prompt.template: [think_answer, answer_only]
  data.shots: [1, 2]
seeds: [0, 1]
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "sweep.yaml").write_text(FILE + f"folder: {tmp_path}\n")
    return sweep.read_sweep(tmp_path / "sweep.yaml")


def test_every_combination_with_every_seed(plan):
    runs = sweep.combinations(plan)
    assert len(runs) == 8
    assert (runs[0].row, runs[0].name) == ("template-think_answer_shots-1", "template-think_answer_shots-1_seed-0")
    assert runs[-1].overrides(plan)[-5:] == [
        "prompt.template=answer_only", "data.shots=2", "run.seed=1",
        f"run.folder={plan.path}", "run.name=template-answer_only_shots-2_seed-1",
    ]  # fmt: skip


ROWS = (
    FILE[: FILE.index("grid:")]
    + """rows:
  default: []
  few & slow: [data.shots=2, optimizer.learning_rate=1e-4]
seeds: [41, 42]
"""
)


def test_settings_one_by_one(tmp_path):
    (tmp_path / "s.yaml").write_text(ROWS)
    plan = sweep.read_sweep(tmp_path / "s.yaml")
    runs = sweep.combinations(plan)
    assert [run.name for run in runs] == ["default_seed-41", "default_seed-42", "few_slow_seed-41", "few_slow_seed-42"]
    assert (plan.axes, runs[2].values) == (["row"], ("few & slow",))
    assert runs[0].overrides(plan)[:3] == ["schedule.steps=2", "optimizer.warmup_steps=0", "run.seed=41"]
    assert runs[2].overrides(plan)[2:5] == ["data.shots=2", "optimizer.learning_rate=1e-4", "run.seed=41"]


def test_a_row_to_compare_with_that_is_none_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_text(ROWS + "against: defalut\n")
    with pytest.raises(
        UserError, match=r"no row is called defalut. Did you mean default\? The rows are default, few_slow"
    ):
        sweep.combinations(sweep.read_sweep(tmp_path / "s.yaml"))


def test_a_row_is_called_as_in_the_file_or_as_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_launch", lambda plan, run, *_: (run, 1.0, 0))
    monkeypatch.setattr(sweep, "read_repeat", lambda folder, seed: Repeat(seed, 4, 0.0, 0.5, 1.0, {}, "", (True,) * 4))
    monkeypatch.setattr(sweep, "_compare", lambda *_: None)
    for against in ("few & slow", "few_slow"):
        (tmp_path / "s.yaml").write_text(f"{ROWS}against: {against}\nfolder: {tmp_path}\n")
        plan = sweep.read_sweep(tmp_path / "s.yaml")
        assert sweep.sweep(plan, 1) == 0
        (first, second) = json.loads((plan.path / "results.json").read_text())
        assert first["against"]["row"] == "few_slow" and second["against"] is None


def test_a_row_without_a_letter_for_its_folder_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_text(ROWS.replace("few & slow", "\N{HIRAGANA LETTER A}"), encoding="utf-8")
    with pytest.raises(UserError, match=r"^rows: '\N{HIRAGANA LETTER A}' names a folder, which needs a letter"):
        sweep.combinations(sweep.read_sweep(tmp_path / "s.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("grid:", "rows: {default: []}\ngrid:", r"give either grid \(all combinations\) or rows"),
        ("data.shots: [1, 2]", "run.seed: [1, 2]", "run.seed is set by the sweep: repeats are listed under seeds"),
        ("schedule.steps=2", "run.name=mine", "run.name is set by the sweep"),
        ("data.shots: [1, 2]", "data.shots: []", "grid.data.shots: List should have at least 1 item"),
        ("seeds:", "sedes:", r"sedes: unknown key; did you mean seeds\? \(line 8\)"),
        ("seeds: [0, 1]", "seeds: []", "seeds: List should have at least 1 item"),
        ("name: shots", "name: ../out", "name: may hold letters"),
        ("data.shots: [1, 2]", "data.shots: 1", "grid.data.shots: must be a list, got 1"),
        ("config: digits", "", "config: missing"),
        ("name: shots", "name: [", "line 4, cannot be read"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, old, new, message):
    (tmp_path / "s.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(UserError, match=message):
        sweep.read_sweep(tmp_path / "s.yaml")


@pytest.mark.parametrize("scalar", ["no", "01", "1e-4", "null", "2026-11-26", "'#1'", "'[2024] photos'", "5.0e-4"])
def test_a_value_of_the_grid_is_the_overrides_text(tmp_path, scalar):
    file = tmp_path / "s.yaml"
    file.write_text(f"name: s\nconfig: ~/c.yaml\ngrid:\n  prompt.subject: [x, {scalar}]\nfolder: $HOME/runs #1st\n")
    with pytest.raises(UserError, match=r"folder: YAML takes #1st for a comment"):
        sweep.read_sweep(file)
    file.write_text(file.read_text().replace(" #1st", " # of all"))
    plan = sweep.read_sweep(file)
    assert plan.folder == Path.home() / "runs" and plan.config == str(Path.home() / "c.yaml")
    assert sweep.combinations(plan)[1].overrides(plan)[0] == f"prompt.subject={scalar.strip(chr(39))}"


def test_a_file_in_the_folder_of_a_run_is_data(tmp_path):
    (tmp_path / "theirs" / "rollouts").mkdir(parents=True)
    (tmp_path / "theirs" / "config.yaml").write_text("")
    (tmp_path / "theirs" / "s.yaml").write_text(FILE)
    with pytest.raises(UserError, match=r"s\.yaml lies in the folder of a run"):
        sweep.read_sweep(tmp_path / "theirs" / "s.yaml")
    (tmp_path / "theirs" / "s.yaml").rename(tmp_path / "s.yaml")
    assert sweep.read_sweep(tmp_path / "s.yaml").name == "shots"


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        sweep.read_sweep(tmp_path / "none.yaml")


def test_a_wrong_value_in_the_grid_is_refused_before_anything_starts(plan, monkeypatch):
    monkeypatch.setattr(sweep, "_launch", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match=r"data\.shots: Input should be greater than or equal to 1"):
        sweep.sweep(plan.model_copy(update={"grid": {"data.shots": ["1", "0"]}}), 1)
    assert not plan.path.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [(["data.test=0"], "data.test is 0: set it"), (["data.folds=5", "data.test=0"], "data.folds is 5: leave it out")],
)
def test_runs_that_measure_no_accuracy_on_test_images_are_refused(plan, monkeypatch, values, message):
    monkeypatch.setattr(sweep, "_launch", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match=f"shots-1_seed-0: a sweep compares runs by .* test images, and {message}"):
        sweep.sweep(plan.model_copy(update={"overrides": [*plan.overrides, *values]}), 1)


def test_runs_on_gpus_of_this_machine_share_one_ray_or_take_turns(tmp_path, monkeypatch):
    """Each Ray of its own would give out the first GPU."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "sweep.yaml").write_text(FILE.replace("config: digits", "config: digits_gpu") + f"folder: {tmp_path}\n")
    plan, launched = sweep.read_sweep(tmp_path / "sweep.yaml"), []
    monkeypatch.setattr(sweep, "_launch", lambda plan, run, *_: launched.append(run) or (run, 1.0, 1))
    monkeypatch.setattr(sweep, "_outcome", lambda plan, run, code: run.name)
    with pytest.raises(UserError, match=r"--parallel is 2, .* `ray start --head`, set RAY_ADDRESS=auto"):
        sweep.sweep(plan, 2)
    assert not launched
    assert sweep.sweep(plan, 1) == 1 and launched
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert sweep.sweep(plan, 2) == 1


def test_a_run_that_was_begun_with_other_steps_is_no_repeat_of_the_others(plan, monkeypatch):
    monkeypatch.setattr(sweep, "_launch", lambda *_: pytest.fail("started"))
    (begun, *_), longer = sweep.combinations(plan), plan.model_copy(update={"overrides": ["schedule.steps=90"]})
    config = load_config(plan.config, begun.overrides(plan))
    (plan.path / begun.name).mkdir(parents=True)
    (plan.path / begun.name / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    message = (
        rf"config.yaml has schedule.steps={config.schedule.steps}, and the sweep has 90 now: remove .*{begun.name}"
    )
    with pytest.raises(UserError, match=message):
        sweep.sweep(longer, 1)
    settings = plan.path / begun.name / "config.yaml"  # goes on by hand to 90 steps, and keeps what it had
    settings.rename(settings.with_name("config-to-000080.yaml"))
    with pytest.raises(UserError, match=r"config-to-000080.yaml has schedule.steps="):
        sweep.sweep(longer, 1)
    settings.with_name("config-to-000080.yaml").unlink()
    (plan.path / begun.name / "model").mkdir()
    monkeypatch.setattr(sweep, "_launch", lambda plan, run, *_: (run, 1.0, 1))
    monkeypatch.setattr(sweep, "_outcome", lambda plan, run, code: run.name)
    assert sweep.sweep(longer, 1) == 1, "what is damaged is the run's to say"


def test_the_same_combination_twice_is_refused(plan):
    with pytest.raises(UserError, match="two runs of the sweep would have one name: shots-1_seed-0, shots-1_seed-1"):
        sweep.combinations(plan.model_copy(update={"grid": {"data.shots": ["1", "1"]}}))


def test_what_a_finished_run_measured(tmp_path):
    run = finished(tmp_path)
    found = sweep.read_repeat(run, 7)
    (before, after) = read_evaluations(run, "test")
    assert (found.seed, found.n, found.before) == (7, after["n"], before["accuracy_strict"])
    assert found.after == after["accuracy_strict"] == sum(found.right) / len(found.right)
    assert (found.format, found.baselines) == (after["format_rate"], {"nearest_neighbour": 0.5})

    # The order of the images in the manifest, and of the answers, is no difference; another label is.
    manifest = json.loads((run / "manifest.json").read_text())
    answers = next((run / "evaluations").glob("step-000006-test.jsonl"))
    manifest["splits"]["test"].reverse()
    answers.write_text("".join(reversed(answers.read_text().splitlines(True))))
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert sweep.read_repeat(run, 7) == found
    manifest["splits"]["test"][0]["label"] = "tulip" if manifest["splits"]["test"][0]["label"] == "rose" else "rose"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert sweep.read_repeat(run, 7).images != found.images

    answers.unlink()
    assert sweep.read_repeat(run, 7).right == ()  # as in runs of earlier versions
    (run / "baselines.json").unlink()
    assert sweep.read_repeat(run, 7) is None  # not complete
    assert sweep.read_repeat(tmp_path / "none", 7) is None


def test_a_class_without_a_training_image_is_measured_apart(tmp_path):
    run = finished(tmp_path)
    assert sweep.read_repeat(run, 7).parts == {}
    manifest = json.loads((run / "manifest.json").read_text())
    splits = manifest["splits"]
    one, other = splits["test"]
    assert one["label"] != other["label"]
    splits["train"] = [entry for entry in splits["train"] if entry["label"] != one["label"]]
    (run / "manifest.json").write_text(json.dumps(manifest))
    found = sweep.read_repeat(run, 7)
    right = {answer.label: float(answer.strict) for answer in read_history(run).tested(6)}
    assert found.parts == {"seen": right[other["label"]], "unseen": right[one["label"]]}


def measured(run: sweep.Run) -> Repeat | None:
    """Of four test images: two right with two shots of seed 0, three with seed 1, and one less with one shot."""
    right = 2 + run.seed - (run.values[1] == "1")
    flags = tuple(index < right for index in range(4))
    baselines = {"nearest_neighbour": 0.25, "logistic_regression": 0.75}
    return Repeat(run.seed, 4, 0.0, right / 4, 1.0, baselines, f"of {run.seed}", flags)


def test_the_table_pairs_rows_by_seed_and_says_what_failed(plan, monkeypatch, capsys):
    """`launch` is stood in for: what is tested is what becomes of its runs."""
    runs = {run.name: run for run in sweep.combinations(plan)}

    def launch(plan, run, steps, bar, launched):
        (plan.path / f"{run.name}.log").write_text("error: no such thing\n")
        (plan.path / run.name).mkdir()
        (plan.path / run.name / "eval.jsonl").write_text("")
        failed = "answer_only_shots-2" in run.name or run.name == "template-answer_only_shots-1_seed-1"
        return run, 1.0, 2 if failed else 0

    monkeypatch.setattr(sweep, "_launch", launch)
    monkeypatch.setattr(sweep, "read_repeat", lambda folder, seed: measured(runs[folder.name]))
    assert sweep.sweep(plan, 1) == 1
    shown = capsys.readouterr()
    log = plan.path / "template-answer_only_shots-2_seed-0.log"
    assert f"failed with exit code 2, see {log}:\n  error: no such thing" in shown.out
    assert "failed: template-answer_only_shots-2_seed-0" in shown.err
    rows = json.loads((plan.path / "results.json").read_text())
    assert [(row["name"], row["seeds"], row["missing"]) for row in rows] == [
        ("template-think_answer_shots-1", [0, 1], []),
        ("template-think_answer_shots-2", [0, 1], []),
        ("template-answer_only_shots-1", [0], [1]),
        ("template-answer_only_shots-2", [], [0, 1]),  # what earlier versions of a failed run left is not counted
    ]
    assert (rows[1]["rates"], rows[1]["rate"], rows[1]["range"]) == ([0.5, 0.75], 0.625, [0.5, 0.75])
    assert rows[1]["against"]["row"] == "template-think_answer_shots-1" and rows[1]["against"]["median"] == 0.25
    assert (rows[1]["against"]["p"], rows[1]["against"]["images"]["n"]) == (0.5, 8)
    table = (plan.path / "table.md").read_text()
    assert (
        "| think_answer | 2 | 0.0 % | **62.5 %** | 50.0 to 75.0 | 0, 1 | +25.0 (+25.0 to +25.0) | 0.5 | +25.0 ("
        in table
    )
    assert "| answer_only | 1 | 0.0 % | **25.0 %** | 25.0 to 25.0 | 0; missing 1 | +0.0 (" in table
    assert "| answer_only | 2 | - | - | - | none; missing 0, 1 |" in table
    assert (plan.path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert table.endswith("(compare.html)\n")
    page = (plan.path / "compare.html").read_text()
    assert page.count("template-think_answer_shots-1_seed-1") > 1 and "template-answer_only_shots-2_seed-0" not in page


def test_a_row_may_be_named_that_others_are_compared_with(plan, monkeypatch):
    runs = {run.name: run for run in sweep.combinations(plan)}
    monkeypatch.setattr(sweep, "_launch", lambda plan, run, *_: (run, 1.0, 0))
    monkeypatch.setattr(sweep, "read_repeat", lambda folder, seed: measured(runs[folder.name]))
    monkeypatch.setattr(sweep, "_compare", lambda *_: None)
    sweep.sweep(plan.model_copy(update={"against": "template-think_answer_shots-2"}), 1)
    rows = json.loads((plan.path / "results.json").read_text())
    assert [row["against"] and row["against"]["median"] for row in rows] == [-0.25, None, -0.25, 0.0]


CHILD = """
import sys
for step in (1, 2):
    print(f"step {step}/3  reward 0.50", flush=True)
print(chr(0x1F339), sys.argv[-1])
sys.exit(3)
"""


def test_a_run_is_followed_step_by_step_and_logged(plan, monkeypatch, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    plan.path.mkdir()
    monkeypatch.setattr(sweep.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{executable}" "{tmp_path}/child.py" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    run, moves = sweep.combinations(plan)[0], []
    bar = SimpleNamespace(update=moves.append, set_postfix_str=lambda name: None)
    _, _, code = sweep._launch(plan, run, 3, bar, [])
    assert (code, moves) == (3, [1, 1, 1])  # the last for what it no longer does
    assert (plan.path / f"{run.name}.log").read_text(encoding="utf-8").splitlines()[-1] == (
        f"\N{ROSE} run.name={run.name}"
    )


SLOW = """
import signal, sys, time
from rft_cluster.common.errors import exit_code
def work():
    print("step 1/3", flush=True)
    for _ in range(6000):  # a signal just before a sleep begins does not cut it short
        time.sleep(0.05)
sys.exit(exit_code(work))
"""
SWEEP = """
import sys
from pathlib import Path
from rft_cluster import sweep
sys.executable = sys.argv[1]
sys.exit(sweep.main(["--config", sys.argv[2], "--parallel", "2"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_sweep_that_is_stopped_stops_its_runs(tmp_path, number):
    (tmp_path / "sweep.yaml").write_text(FILE + f"folder: {tmp_path}\n")
    plan = sweep.read_sweep(tmp_path / "sweep.yaml")
    (tmp_path / "child.py").write_text(SLOW)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{executable}" "{tmp_path}/child.py"\n')
    (tmp_path / "python").chmod(0o755)
    process = subprocess.Popen(
        [executable, "-c", SWEEP, tmp_path / "python", tmp_path / "sweep.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    logs = [plan.path / f"{run.name}.log" for run in sweep.combinations(plan)]
    deadline = time.monotonic() + 120
    while sum(log.exists() and "step 1/3" in log.read_text() for log in logs) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.endswith("interrupted: start the sweep again to go on where it stopped\n")
    assert "Traceback" not in error
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert [log.read_text() for log in logs if log.exists()] == ["step 1/3\ninterrupted\n"] * 2
