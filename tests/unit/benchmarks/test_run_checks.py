"""The tiers *shared* and *digits*: what their checks say of a run's records, and how the memory is watched."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from benchmarks.gpu_check import digits, shared
from benchmarks.gpu_check.checklist import Bench
from benchmarks.gpu_check.material import run_config
from benchmarks.turns import Enough
from rft_cluster.config import load_config

GPU, CPU = Bench("cuda", "true", None), Bench("cpu", "tiny", None)


def row(step: int, **changes) -> dict:
    times = {"seconds/generate": 1.0, "seconds/learn": 2.0, "seconds/transfer": 1.0}
    own = {"logprob_gap": 0.01, "skipped": 0, "grad_norm": 3.0, "memory_gib": 60.0 + step, "tokens_per_second": 900.0}
    return {"step": step, **own, **times, **changes}


GOOD = shared.Run(
    "ipc", 60.0, [row(1), row(2), row(3)], {"generate": 40.0, "learn": 70.0, "transfer": 75.0}, ([1], [2]),
    {"generator": 3},
)  # fmt: skip


@pytest.fixture
def found(monkeypatch):
    """Makes a check see a run that was as `GOOD`, but for the changes."""
    monkeypatch.setattr(shared, "whole_memory", lambda device: 79.6)

    def see(check: str, **changes):
        monkeypatch.setattr(shared, "run", lambda bench: replace(GOOD, **changes))
        (named,) = [one for one in shared.CHECKS if one.name == check]
        return named.run(GPU)

    return see


def test_all_checks_pass_a_good_run(found):
    assert [check.name for check in shared.CHECKS if not found(check.name).passed] == []


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("transfer: version held, verified", {"held": {"generator": 2}}),
        ("transfer: version held, verified", {"held": {}}),
        ("transfer: version held, verified", {"transfer": "nccl"}),
        ("transfer: version held, verified", {"loaded": ([1], [1])}),  # old weights in the engine, well verified
        ("steps: log-prob gap", {"rows": [row(1), row(2, logprob_gap=0.17), row(3)]}),
        ("steps: updates made", {"rows": [row(1), row(2)]}),
        ("steps: updates made", {"rows": [row(1), row(2, skipped=1), row(3)]}),
        ("steps: updates made", {"rows": [row(1), row(2, grad_norm=0.0), row(3)]}),
        ("steps: updates made", {"rows": [row(1), {"step": 2}, row(3)]}),  # no group taught anything
        ("memory: transfer", {"peaks": {"generate": 40.0, "learn": 70.0, "transfer": 78.9}}),
    ],
)
def test_a_bad_run_fails_its_check(found, check, changes):
    assert not found(check, **changes).passed


def test_times_leave_the_first_step_out(found):
    slow = [row(1, **{"seconds/learn": 20.0}), row(2), row(3)]
    assert found("seconds a step", rows=slow).figure == 4.0
    assert found("share of a step: learn", rows=slow).figure == 50.0


def test_the_peak_of_each_phase_is_kept():
    used = iter([5.0, 9.0, 2.0, 7.0])
    gauge = shared.Gauge(lambda: next(used))
    gauge.look()
    gauge.enter("learn")  # looks once more before it
    gauge.enter("generate")
    gauge.look()
    assert gauge.peaks == {"start": 9.0, "learn": 2.0, "generate": 7.0}


def test_memory_is_watched_until_the_end(monkeypatch):
    monkeypatch.setattr(shared, "PERIOD", 0.001)
    monkeypatch.setattr(shared, "process_memory", lambda pid: 1.5)
    with shared.memory_watched("cpu") as gauge:
        while not gauge.peaks:
            time.sleep(0.001)
    assert gauge.peaks == {"start": 1.5}


def test_the_fullest_gpu_counts(monkeypatch):
    said = subprocess.CompletedProcess([], 0, stdout="1024\n20480\n")
    monkeypatch.setattr(shared.subprocess, "run", lambda *_, **__: said)
    assert shared.card_memory() == 20.0


@pytest.mark.parametrize("staleness", [0, 1])
def test_all_steps_are_made_with_prefetch_too(tmp_path, staleness):
    """In the last step but one, prefetch asks for the prompts of a step that is never made."""
    bench = Bench("cpu", "tiny", tmp_path)
    chosen = (f"schedule.max_staleness={staleness}", "schedule.prompts_per_step=2", "data.validation=0", "data.test=0")
    task = shared.made_task(bench, run_config(bench, *chosen))
    steps = shared.STEPS + staleness
    seen = [example.image.sha256 for step in range(steps) for example in task.dataset.batch(0, step, 2)]
    assert len(set(seen)) == 2 * steps
    with pytest.raises(Enough):
        task.dataset.batch(0, steps, 2)


# The tier digits


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Stands for a run that writes records: `tests`, accuracies on the test images, and `gap`, of each step."""
    commands = []

    def launch(tests=(0.1, 0.87), gap=0.001, code=0, said=""):
        def run(command, **_):
            commands.append(command)
            folder = tmp_path / "digits"
            folder.mkdir(exist_ok=True)
            evaluations = [{"split": "test", "accuracy_strict": one} for one in tests]
            evaluations.append({"split": "validation", "accuracy_strict": 0.9})
            (folder / "eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluations))
            steps = [{key: value for key, value in row(1).items() if key != "logprob_gap"}, row(2, logprob_gap=gap)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
            return subprocess.CompletedProcess(command, code, stderr=said)

        monkeypatch.setattr(digits.subprocess, "run", run)
        monkeypatch.setattr(digits, "run", digits.once(made))
        return {check.name.partition(",")[0]: check.run for check in digits.CHECKS}

    made = digits.launched
    return launch, commands, Bench("cuda", "true", tmp_path)


def test_a_run_that_learned_passes(launched):
    launch, commands, bench = launched
    checks = launch()
    assert all(run(bench).passed for run in checks.values())
    assert checks["test accuracy"](bench).note.startswith("before 10.0 %, 2 steps")
    (command,) = commands
    assert command[:5] == [sys.executable, "-m", "rft_cluster.launch", "--config", "digits_gpu"]


def test_an_earlier_run_does_not_count(launched):
    launch, _, bench = launched
    (bench.folder / "digits").mkdir()
    (bench.folder / "digits" / "metrics.jsonl.old").touch()
    launch()["seconds a step"](bench)
    assert not (bench.folder / "digits" / "metrics.jsonl.old").exists()


def test_a_run_that_learned_nothing_or_sampled_by_stale_weights_fails(launched):
    launch, _, bench = launched
    assert not launch(tests=(0.1, 0.11))["test accuracy"](bench).passed
    assert not launch(gap=0.17)["log-prob gap"](bench).passed


def test_a_run_that_ended_with_an_error_says_why(launched):
    launch, _, bench = launched
    with pytest.raises(RuntimeError, match="exit code 2: error: a generator is out of memory"):
        launch(code=2, said="loading\nerror: a generator is out of memory\n")["test accuracy"](bench)


def test_digits_gpu_is_digits_on_one_shared_gpu():
    cpu, gpu = (load_config(name, []).model_dump() for name in ("digits", "digits_gpu"))
    differ = {f"{section}.{key}" for section in cpu if isinstance(cpu[section], dict) for key in cpu[section]
              if cpu[section][key] != gpu[section][key]}  # fmt: skip
    assert differ <= {
        "run.name", "generators.gpus", "generators.gpu_memory", "learners.gpus", "learners.count", "learners.cpus",
        "learners.micro_batch_tokens", "cluster.device", "cluster.dtype", "cluster.snapshot_every",
    }  # fmt: skip
    assert load_config("digits_gpu", []).shares_gpus
