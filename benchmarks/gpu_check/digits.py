"""The tier *digits*: a run that learns, by the command that users call. On a GPU `digits_gpu`, on a CPU `digits`.

The small model is built on first use, in about a minute.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu_check.checklist import Bench, Check, Outcome, once

CONFIG = {"cuda": "digits_gpu", "cpu": "digits"}
STEPS = {"true": 30, "tiny": 20}
ACCURACY = 0.5  # of ten classes; on two CPU cores it was 0.74 to 0.86 after 20 steps
NATS = 0.02  # log-prob gap; stale weights made it 0.17
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The rows of metrics.jsonl, and those of eval.jsonl about the test images."""

    steps: Sequence[Row]
    tests: Sequence[Row]
    seconds: float


def launched(bench: Bench) -> Run:
    """Run the command, and read its records."""
    folder = bench.folder / "digits"
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "rft_cluster.launch", "--config", CONFIG[bench.device]),
        *(f"run.folder={bench.folder}", "run.name=digits", f"schedule.steps={STEPS[bench.size]}"),
        "schedule.evaluate_every=0",
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    print(done.stderr, flush=True)
    if done.returncode:
        last = (done.stderr.strip() or "nothing said").splitlines()[-1]
        raise RuntimeError(f"the run ended with exit code {done.returncode}: {last}")
    tests = [row for row in rows(folder / "eval.jsonl") if row["split"] == "test"]
    return Run(rows(folder / "metrics.jsonl"), tests, time.monotonic() - started)


run = once(launched)


def rows(file: Path) -> list[Row]:
    return [json.loads(row) for row in file.read_text().splitlines()]


def accuracy(bench: Bench) -> Outcome:
    found = run(bench)
    first, last = (100 * found.tests[index]["accuracy_strict"] for index in (0, -1))
    note = f"before {first:.1f} %, {len(found.steps)} steps, {found.seconds:.0f} s in all"
    return Outcome(last >= 100 * ACCURACY, last, "%", note)


def logprob_gap(bench: Bench) -> Outcome:
    """Steps without a live group make no update, and have no gap."""
    gap = max(row["logprob_gap"] for row in run(bench).steps if "logprob_gap" in row)
    return Outcome(gap <= NATS, gap, "nats")


def seconds(bench: Bench) -> Outcome:
    parts = [{name: row[f"seconds/{name}"] for name in ("generate", "learn", "transfer")} for row in run(bench).steps]
    said = ", ".join(f"{name} {median(part[name] for part in parts):.2f}" for name in parts[0])
    return Outcome(True, median(sum(part.values()) for part in parts), "s", said)


CHECKS = (
    Check("test accuracy", f"at least {100 * ACCURACY:.0f} %", accuracy),
    Check("log-prob gap, the largest of all steps", f"at most {NATS} nats", logprob_gap),
    Check("seconds a step", "measured", seconds),
)
