"""G3: max(generate, learn) / wall with `schedule.max_staleness`, on roles that sleep (see emulated.py).

    python -m benchmarks.overlap [--steps 6] [--repeats 5]

1 would be a step in which the slower role never waits. Beside it the same with strictly alternating roles.
"""

import json
import tempfile
import time
from dataclasses import asdict
from typing import Any, NamedTuple

import ray

from benchmarks.common import machine, parsed, spread, write_result
from benchmarks.emulated import EmulatedCluster, Seconds, dataset
from rft_cluster.config import Config, load_config
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.metrics import StepStats
from rft_cluster.run.task import Task
from rft_cluster.train import train

# Roles' seconds a step, and the values of max_staleness to measure.
CASES = {
    "equal": (Seconds(2.0, 2.0, 0.02), (0, 1, 2)),
    "learning longer": (Seconds(1.0, 2.0, 0.02), (1,)),
    "generating longer": (Seconds(2.0, 1.0, 0.02), (1,)),
}
SKIPPED = 2  # steps until the pipeline is full
ROLES = ["schedule.evaluate_every=0", "schedule.save_every=0", "optimizer.warmup_steps=0", "data.test=0",
         "data.validation=0", "generators.count=4", "learners.count=2", "schedule.prompts_per_step=16"]  # fmt: skip


def main() -> None:
    options = parsed(__doc__, steps=6, repeats=5)
    ray.init(address="local", num_cpus=8, log_to_driver=False, logging_level="warning", include_dashboard=False)
    rows = []
    for name, (seconds, values) in CASES.items():
        cluster = EmulatedCluster(load_config("digits", ROLES), seconds)
        measured: dict[int, list[float]] = {value: [] for value in values}
        for repeat in range(options.repeats):
            for value in values:  # in turns
                changes = [f"run.seed={repeat}", f"schedule.steps={options.steps}", f"schedule.max_staleness={value}"]
                step = run_steps([*ROLES, *changes], cluster)
                measured[value].append(max(seconds.generate, seconds.learn) / step.wall)
        cluster.close()
        for value, ratios in measured.items():
            rows.append({"case": name, **asdict(seconds), "max_staleness": value, "ratio": asdict(spread(ratios))})
            print(json.dumps(rows[-1]), flush=True)
    write_result("overlap", {"machine": machine(), "steps": options.steps, "rows": rows})


class StepSeconds(NamedTuple):
    """What a step takes: of the clock, of the driver's process, of its thread that runs the loop; and its stages."""

    wall: float
    driver_cpu: float
    loop_cpu: float
    stages: dict[str, float]


class TimedRun(RunFolder):
    """Notes when a step ends, by the three clocks of `StepSeconds`, and what its stages took, the record's own too."""

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        self.ends: list[tuple[float, float, float]] = []
        self.stages: list[dict[str, float]] = []

    def log_step(self, stats: StepStats, *arguments: Any) -> None:
        start = time.monotonic()
        super().log_step(stats, *arguments)
        self.ends.append((time.monotonic(), time.process_time(), time.thread_time()))
        self.stages.append({**stats.seconds, "log": self.ends[-1][0] - start})


def run_steps(overrides: list[str], cluster: EmulatedCluster) -> StepSeconds:
    """A step of `train`, on average from when the pipeline is full to its end."""
    task = Task(dataset(64, 100_000), "Which flower?")
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("digits", [f"run.folder={folder}", "run.name=emulated", *overrides])
        run = TimedRun(config, task)
        train(config, task, cluster.cluster, run)
    ends, stages = run.ends, run.stages
    counted = len(ends) - SKIPPED
    wall, driver, loop_thread = (
        (last - first) / counted for first, last in zip(ends[SKIPPED - 1], ends[-1], strict=True)
    )
    means = {name: sum(step[name] for step in stages[SKIPPED:]) / counted for name in stages[0]}
    return StepSeconds(wall, driver, loop_thread, {"hand out": wall - sum(means.values()), **means})


if __name__ == "__main__":
    main()
