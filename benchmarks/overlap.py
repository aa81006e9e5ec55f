"""G3: max(generate, learn) / wall with `schedule.max_staleness`, on roles that sleep (see emulated.py).

    python -m benchmarks.overlap [--steps 12] [--repeats 5]

1 would be a step in which the slower role never waits. Beside it the same with strictly alternating roles.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import ray

from benchmarks.common import machine, write_result
from benchmarks.emulated import Seconds, emulated_cluster, examples
from rft_cluster import train as loop
from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.prepare import Task

CASES = {"equal": Seconds(2.0, 2.0, 0.02), "learning longer": Seconds(1.0, 2.0, 0.02),
         "generating longer": Seconds(2.0, 1.0, 0.02)}  # fmt: skip
SKIPPED = 2  # steps until the pipeline is full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ray.init(num_cpus=8, log_to_driver=False, logging_level="warning", include_dashboard=False)
    rows = []
    for name, seconds in CASES.items():
        measured: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for repeat in range(options.repeats):
            for staleness in measured:  # in turns
                wall = step_seconds(seconds, staleness, options.steps, repeat)
                measured[staleness].append(max(seconds.generate, seconds.learn) / wall)
        for staleness, ratios in measured.items():
            row = {"case": name, **vars_of(seconds), "max_staleness": staleness, "ratio": statistics.median(ratios),
                   "range": [min(ratios), max(ratios)]}  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_result("overlap", {"machine": machine(), "steps": options.steps, "repeats": options.repeats, "rows": rows})


def vars_of(seconds: Seconds) -> dict[str, float]:
    return {"generate": seconds.generate, "learn": seconds.learn, "transfer": seconds.transfer}


def step_seconds(seconds: Seconds, staleness: int, steps: int, seed: int) -> float:
    """Wall seconds of a step in the middle of a run, from the times at which its lines are written."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "digits",
            [f"run.folder={folder}", "run.name=overlap", f"run.seed={seed}", f"schedule.steps={steps}",
             f"schedule.max_staleness={staleness}", "schedule.evaluate_every=0", "schedule.save_every=0",
             "optimizer.warmup_steps=0", "schedule.prompts_per_step=16", "data.test=0", "data.validation=0",
             "generators.count=4", "learners.count=2"],
        )  # fmt: skip
        return run_steps(config, seconds)[1]


def run_steps(config: Config, seconds: Seconds) -> tuple[float, float]:
    """The driver's CPU seconds and the wall seconds a step, from when the pipeline is full to the last step."""
    import time

    train_set = examples(64, 100_000)
    task = Task(FewShotDataset("emulated", ["rose", "tulip"], train_set, [], [], []), "Which flower?")
    ends: list[tuple[float, float]] = []
    log_step = loop.RunFolder.log_step

    def timed(self: loop.RunFolder, *arguments: object) -> None:
        log_step(self, *arguments)  # type: ignore[arg-type]
        ends.append((time.process_time(), time.monotonic()))

    original = loop.start_cluster
    loop.start_cluster, loop.RunFolder.log_step = emulated_cluster(seconds), timed  # type: ignore[assignment,method-assign]
    try:
        loop.train(config, task, "nothing", resume=False)
    finally:
        loop.start_cluster, loop.RunFolder.log_step = original, log_step  # type: ignore[method-assign]
    (cpu_first, first), (cpu_last, last) = ends[SKIPPED - 1], ends[-1]
    steps = len(ends) - SKIPPED
    return (cpu_last - cpu_first) / steps, (last - first) / steps


if __name__ == "__main__":
    Path("benchmarks/results").mkdir(exist_ok=True)
    main()
