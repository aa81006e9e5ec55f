"""What the controller costs: a step's wall time beyond the roles' own, with roles that sleep (see emulated.py).

    python -m benchmarks.controller [--generators 4,16,64] [--learners 8]

16 prompts with 100 kB of image and 8 completions each, and the same with 4 prompts a generator. What is left of a
step's wall time is the driver, Ray, and, where more processes than cores must be woken, the machine itself. So the
processor time of the driver's process, Ray's threads in it included, and of its thread that runs the loop, stand beside
it, and the stages in which the time is spent.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import ray

from benchmarks.common import machine, parsed, spread, write_result
from benchmarks.emulated import EmulatedCluster, Seconds
from benchmarks.overlap import ROLES, StepSeconds, run_steps
from rft_cluster.config import load_config

SECONDS = Seconds(0.5, 0.5, 0.0)
OWN = asdict(SECONDS)  # by stage of the loop
STEPS = 10


def main() -> None:
    options = parsed(__doc__, generators=[4, 16, 64], learners=8, repeats=5)
    ray.init(address="local", num_cpus=128, log_to_driver=False, logging_level="warning", include_dashboard=False)
    result: dict[str, Any] = {"machine": machine(), "role_seconds": OWN, "steps": STEPS, "rows": []}
    for generators in options.generators:
        roles = [*ROLES, f"generators.count={generators}", f"learners.count={options.learners}"]
        cluster = EmulatedCluster(load_config("digits", roles), SECONDS)
        for prompts in sorted({16, 4 * generators}):
            changes = [f"schedule.prompts_per_step={prompts}", f"schedule.steps={STEPS}"]
            steps = [run_steps([*roles, *changes], cluster) for _ in range(options.repeats)]
            result["rows"].append(
                {
                    "generators": generators, "learners": options.learners, "prompts": prompts,
                    "beyond_roles_ms": asdict(spread([1000 * (step.wall - sum(OWN.values())) for step in steps])),
                    "driver_cpu_ms": asdict(spread([1000 * step.driver_cpu for step in steps])),
                    "loop_cpu_ms": asdict(spread([1000 * step.loop_cpu for step in steps])),
                    "stages_ms": stages(steps),
                }
            )  # fmt: skip
            print(json.dumps(result["rows"][-1]), flush=True)
            write_result("controller", result)
        cluster.close()


def stages(steps: Sequence[StepSeconds]) -> dict[str, float]:
    """Milliseconds of a step's stages beyond the roles' own: medians."""
    beyond = [{name: 1000 * (step.stages[name] - OWN.get(name, 0.0)) for name in step.stages} for step in steps]
    return {name: median(one[name] for one in beyond) for name in beyond[0]}


if __name__ == "__main__":
    main()
