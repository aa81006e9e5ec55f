"""A real sweep that is stopped within a run: started again, it goes on within that run, and ends with the table."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.head import wait_until

FILE = """
name: two
config: digits
overrides: [schedule.steps=6, optimizer.warmup_steps=0, data.validation=0, data.test=40, schedule.evaluate_every=0]
rows:
  default: []
  warmer: [sampling.temperature=1.2]
seeds: [0]
"""


def started(file: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rft_cluster.sweep", "--config", file]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def recorded(run: Path) -> str:
    """The rows of a run's steps, with the seconds that each took."""
    file = run / "metrics.jsonl"
    return file.read_text() if file.exists() else ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_that_is_stopped_within_a_run_goes_on_within_it(tmp_path):
    (tmp_path / "two.yaml").write_text(FILE + f"folder: {tmp_path}\n")
    sweep, first = tmp_path / "two", tmp_path / "two" / "default_seed-0"
    process = started(tmp_path / "two.yaml")
    wait_until(lambda: "\n" in recorded(first) or process.poll() is not None, 300, "a step")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[1].endswith("start the sweep again to go on where it stopped\n")
    assert process.returncode == 128 + signal.SIGTERM
    before = recorded(first)
    assert 0 < before.count("\n") < 6 and not (first / "model").exists() and not (sweep / "table.md").exists()

    out, error = started(tmp_path / "two.yaml").communicate(timeout=900)
    assert "2/2 warmer_seed-0: test accuracy" in out and "failed:" not in error, out + error
    after = recorded(first)
    assert after.startswith(before), "a step was done twice"
    assert [json.loads(line)["step"] for line in after.splitlines()] == [1, 2, 3, 4, 5, 6]
    rows = json.loads((sweep / "results.json").read_text())
    assert [(row["name"], row["seeds"], row["missing"], row["n"]) for row in rows] == [
        ("default", [0], [], 40), ("warmer", [0], [], 40)
    ]  # fmt: skip
    assert rows[1]["against"]["images"]["n"] == 40
