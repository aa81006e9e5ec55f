"""What the controller costs: a step's wall time beyond the roles' own, with roles that sleep (see emulated.py).

    python -m benchmarks.controller [--generators 4,16,64] [--learners 8]

What is left of a step's wall time is the driver, Ray, and, where more processes than cores must be woken, the machine
itself. So the driver's own CPU time stands beside it. 16 prompts with 100 kB of image and 8 completions each, and the
same with 4 prompts a generator. Beyond the generators that can be started here a step is simulated: the driver's calls
one after another, at the cost for each prompt and each generator that was measured.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import ray

from benchmarks.common import machine, spread, write_result
from benchmarks.emulated import EmulatedCluster, Seconds
from benchmarks.overlap import ROLES, run_steps
from rft_cluster.config import load_config

SECONDS = Seconds(0.5, 0.5, 0.0)
STEPS = 10
SIMULATED = (128, 256, 512, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", default="4,16,64")
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=128, log_to_driver=False, logging_level="warning", include_dashboard=False)
    rows = []
    for generators in map(int, options.generators.split(",")):
        roles = [*ROLES, f"generators.count={generators}", f"learners.count={options.learners}"]
        cluster = EmulatedCluster(load_config("digits", roles), SECONDS)
        for prompts in sorted({16, 4 * generators}):
            changes = [f"schedule.prompts_per_step={prompts}", f"schedule.steps={STEPS}"]
            costs = [run_steps([*roles, *changes], cluster) for _ in range(options.repeats)]
            beyond = [1000 * (wall - SECONDS.generate - SECONDS.learn - SECONDS.transfer) for _, wall in costs]
            row = {
                "generators": generators, "learners": options.learners, "prompts": prompts,
                "beyond_roles_ms": asdict(spread(beyond)),
                "driver_cpu_ms": asdict(spread([1000 * cpu for cpu, _ in costs])),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
        cluster.close()
    simulated = simulate(rows)
    for row in simulated:
        print(json.dumps(row))
    write_result(
        "controller", {"machine": machine(), "role_seconds": 1.0, "steps": STEPS, "rows": rows, "simulated": simulated}
    )


def simulate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The driver's CPU time, fitted as fixed + a * generators + b * prompts by least squares, for more generators."""
    known = np.array([[1, row["generators"], row["prompts"]] for row in rows], dtype=float)
    cost = np.array([row["driver_cpu_ms"]["median"] for row in rows])
    fit, *_ = np.linalg.lstsq(known, cost, rcond=None)
    return [
        {"generators": count, "prompts": 4 * count, "driver_cpu_ms": float(fit @ np.array([1, count, 4 * count]))}
        for count in SIMULATED
    ]


if __name__ == "__main__":
    main()
