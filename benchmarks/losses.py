"""The effective training time of a run whose actors are killed again and again.

    python -m benchmarks.losses [--steps 20] [--every 10] [--prompts 2300]

A real run of the digits, with real learners and engines, whose steps take half a minute. In every tenth step an actor
is killed, a generator and a learner in turn, at a moment within the stage in which it works. Effective training time:
what the steps would have taken if each had taken the median of the undisturbed ones, over what they took. What the run
does for its safety is timed in the same steps: the journal (while the learners work), and what training waits for
snapshots and checkpoints.
"""

import random
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.common import CACHE, machine, parsed, spread, write_result
from rft_cluster import launch
from rft_cluster.config import Config, load_config
from rft_cluster.run.journal import Journal
from rft_cluster.run.records import read_rows
from rft_cluster.run.saving import Keeper

VICTIMS = ("Generator", "Learner")
STAGES = {"Generator": "generate", "Learner": "learn"}
POLL = 0.05  # seconds


class Clock:
    """Seconds spent in methods, by their names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def times(self, kind: type, method: str, name: str) -> None:
        """Add up the seconds of all calls of a method."""
        own: Callable[..., Any] = getattr(kind, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.monotonic()
            try:
                return own(*arguments, **named)
            finally:
                self.seconds[name] += time.monotonic() - began

        setattr(kind, method, timed)


class Striker:
    """Kills an actor in every `every`th step, and notes when each step was recorded."""

    def __init__(self, config: Config, every: int) -> None:
        self._metrics, self._steps, self._every = config.run_folder / "metrics.jsonl", config.schedule.steps, every
        self.recorded: dict[int, float] = {}  # step -> when it was recorded last
        self.struck: dict[int, str] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        chance = random.Random(0)
        while len(self.recorded) < self._steps:
            rows = read_rows(self._metrics)
            if rows and rows[-1]["step"] not in self.recorded:
                step = rows[-1]["step"]
                self.recorded[step] = time.monotonic()
                if (step + 1) % self._every == 0:
                    self._strike(step + 1, rows[-1], chance.uniform(0.2, 0.8))
            time.sleep(POLL)

    def _strike(self, step: int, before: dict[str, Any], share: float) -> None:
        """Kill the next victim when `share` of its stage is over, going by the step before."""
        role = VICTIMS[len(self.struck) % len(VICTIMS)]
        stage = STAGES[role]
        wait = share * before[f"seconds/{stage}"] + (before["seconds/generate"] if stage == "learn" else 0.0)
        time.sleep(wait)
        below = {process.pid for process in psutil.Process().children(recursive=True)}
        victim = next(
            process
            for process in psutil.process_iter(["cmdline"])  # passes over a process that ends meanwhile
            if process.pid in below and f"ray::{role}" in "".join((process.info["cmdline"] or [])[:1])
        )
        victim.send_signal(signal.SIGKILL)
        self.struck[step] = role
        print(f"killed {role} {victim.pid} {wait:.1f} s into step {step}", flush=True)


def main() -> None:
    options = parsed(__doc__, steps=20, every=10, prompts=2300, name="losses")
    overrides = [
        f"run.folder={CACHE / 'run'}",
        f"schedule.steps={options.steps}",
        f"schedule.prompts_per_step={options.prompts}",
        "optimizer.warmup_steps=0",
        "schedule.evaluate_every=0",
        "schedule.save_every=5",
        "cluster.snapshot_every=1",
        "schedule.stop_when_stuck=0",
        "data.validation=0",
        "data.test=0",
    ]
    config = load_config("digits", overrides)
    shutil.rmtree(config.run.folder, ignore_errors=True)
    clock = Clock()
    clock.times(Journal, "commit", "journal")
    clock.times(Keeper, "save_if_due", "snapshots and checkpoints")
    striker = Striker(config, options.every)
    code = launch.main(["--config", "digits", *overrides])
    assert code == 0, "the run did not end as it should"
    found = {"machine": machine(), "prompts": options.prompts, **summary(config, striker, clock)}
    write_result(options.name, found)
    print(f"effective training time {found['effective_training_time']:.3f}, of a step: {found['share_of_a_step']}")


def summary(config: Config, striker: Striker, clock: Clock) -> dict[str, Any]:
    moments = [striker.recorded[step] for step in sorted(striker.recorded)]
    differences = [after - before for before, after in pairwise(moments)]
    durations = dict(zip(sorted(striker.recorded)[1:], differences, strict=True))
    calm = [seconds for step, seconds in durations.items() if step not in striker.struck]
    usual = median(calm)
    return {
        "steps": len(durations),
        "step_seconds": spread(calm),
        "losses": [
            {"step": step, "killed": role, "seconds_lost": durations[step] - usual}
            for step, role in striker.struck.items()
        ],
        "effective_training_time": usual * len(durations) / (moments[-1] - moments[0]),
        "share_of_a_step": {
            name: seconds / len(striker.recorded) / usual for name, seconds in sorted(clock.seconds.items())
        },
        "journal_bytes_a_step": _journal_bytes(config.run_folder),
    }


def _journal_bytes(run: Path) -> int:
    return max(file.stat().st_size for file in (run / "journal").glob("*.jsonl"))


if __name__ == "__main__":
    main()
