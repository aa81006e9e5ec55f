"""What the controller costs: a step's wall time beyond the roles' own, with roles that sleep (see emulated.py).

    python -m benchmarks.controller [--generators 4,16,64] [--learners 8]

Each role sleeps; what is left of a step's wall time is the driver, Ray, and, where more processes than cores must be
woken, the machine itself. So the driver's own CPU time stands beside it. 16 prompts of 100 kB and 8 completions each,
and the same with 4 prompts a generator. For more generators than can be started here, the step is simulated from
the cost a prompt and a generator that was measured.
"""

import argparse
import json
import statistics
import tempfile

import ray

from benchmarks.common import machine, write_result
from benchmarks.emulated import Seconds
from benchmarks.overlap import run_steps
from rft_cluster.config import load_config

SECONDS = Seconds(0.5, 0.5, 0.0)
STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generators", default="4,16,64")
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ray.init(num_cpus=128, log_to_driver=False, logging_level="warning", include_dashboard=False)
    rows = []
    for generators in map(int, options.generators.split(",")):
        for prompts in sorted({16, 4 * generators}):
            costs = [step_cost(generators, options.learners, prompts) for _ in range(options.repeats)]
            cpu, beyond = ([1000 * cost[i] for cost in costs] for i in (0, 1))
            row = {
                "generators": generators, "learners": options.learners, "prompts": prompts,
                "beyond_roles_ms": statistics.median(beyond), "beyond_roles_range": [min(beyond), max(beyond)],
                "driver_cpu_ms": statistics.median(cpu), "driver_cpu_range": [min(cpu), max(cpu)],
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_result("controller", {"machine": machine(), "role_seconds": 1.0, "steps": STEPS, "rows": rows})


def step_cost(generators: int, learners: int, prompts: int) -> tuple[float, float]:
    """The driver's CPU seconds a step, and the wall seconds beyond what the roles sleep."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "digits",
            [f"run.folder={folder}", "run.name=controller", f"schedule.steps={STEPS}", "schedule.evaluate_every=0",
             "schedule.save_every=0", "optimizer.warmup_steps=0", f"schedule.prompts_per_step={prompts}",
             "data.test=0", "data.validation=0", f"generators.count={generators}", f"learners.count={learners}"],
        )  # fmt: skip
        cpu, wall = run_steps(config, SECONDS)
    return cpu, wall - SECONDS.generate - SECONDS.learn - SECONDS.transfer


if __name__ == "__main__":
    main()
