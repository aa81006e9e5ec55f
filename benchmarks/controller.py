"""What the controller costs: a step's wall time beyond the roles' own, with roles that sleep (see emulated.py).

    python -m benchmarks.controller [--generators 4,16,64] [--learners 8]

16 prompts with 100 kB of image and 8 completions each, and the same with 4 prompts a generator. What is left of a
step's wall time is the driver, Ray, and, where more processes than cores must be woken, the machine itself. So the
processor time of the driver's process, Ray's threads in it included, and of its thread that runs the loop, stand beside
it, and the stages in which the time is spent. Beyond the generators that can be started here a step is simulated, event
by event, with each stage's cost as it was measured.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import ray

from benchmarks.common import machine, spread, write_result
from benchmarks.emulated import EmulatedCluster, Seconds
from benchmarks.overlap import ROLES, StepSeconds, run_steps
from rft_cluster.config import load_config

SECONDS = Seconds(0.5, 0.5, 0.0)
OWN = asdict(SECONDS)  # by stage of the loop
STEPS = 10
SIMULATED = (128, 256, 512, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", default="4,16,64")
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=128, log_to_driver=False, logging_level="warning", include_dashboard=False)
    result: dict[str, Any] = {"machine": machine(), "role_seconds": OWN, "steps": STEPS, "rows": []}
    for generators in map(int, options.generators.split(",")):
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
    costs = fitted(result["rows"])
    sizes = [(row["generators"], row["prompts"]) for row in result["rows"]]
    result["costs_ms"] = asdict(costs)
    result["simulated"] = [
        {"generators": generators, "prompts": prompts, "beyond_roles_ms": simulated(costs, generators, prompts)}
        for generators, prompts in [*sizes, *((count, 4 * count) for count in SIMULATED)]
    ]
    print(json.dumps([result["costs_ms"], *result["simulated"]], indent=1))
    write_result("controller", result)


def stages(steps: Sequence[StepSeconds]) -> dict[str, float]:
    """Milliseconds of a step's stages beyond the roles' own: medians."""
    beyond = [{name: 1000 * (step.stages[name] - OWN.get(name, 0.0)) for name in step.stages} for step in steps]
    return {name: median(one[name] for one in beyond) for name in beyond[0]}


@dataclass(frozen=True)
class Costs:
    """Milliseconds: `fixed` a step, and what is done one after another for each call and each prompt."""

    fixed: float
    give: float  # to hand a generator its prompts
    give_prompt: float
    take: float  # to take a generator's groups, and have them scored
    take_prompt: float
    learn_prompt: float
    transfer: float  # for each generator
    log_prompt: float


def fitted(rows: Sequence[Mapping[str, Any]]) -> Costs:
    """By least squares, from stages' times with various numbers of generators and prompts; costs are not negative."""
    numbers = np.array([[1, row["generators"], row["prompts"]] for row in rows], dtype=float)

    def plane(stage: str, *columns: int) -> list[float]:
        times = np.array([row["stages_ms"][stage] for row in rows])
        fit, *_ = np.linalg.lstsq(numbers[:, list(columns)], times, rcond=None)
        return [max(0.0, float(value)) for value in fit]

    give, take, log = plane("hand out", 0, 1, 2), plane("generate", 0, 1, 2), plane("log", 0, 2)
    transfer, learn = plane("transfer", 0, 1), plane("learn", 0, 2)
    fixed = give[0] + take[0] + log[0] + transfer[0] + learn[0]
    return Costs(fixed, give[1], give[2], take[1], take[2], learn[1], transfer[1], log[1])


def simulated(costs: Costs, generators: int, prompts: int) -> float:
    """Milliseconds of a step beyond the roles' own.

    The driver hands out one share after another, and takes back, one after another, what is written by then.
    """
    share, generate = prompts / generators, 1000 * SECONDS.generate
    now, written = 0.0, list[float]()
    for _ in range(generators):
        now += costs.give + costs.give_prompt * share
        written.append(now + generate)
    for done in written:
        now = max(now, done) + costs.take + costs.take_prompt * share
    each_prompt = costs.learn_prompt + costs.log_prompt
    return now - generate + costs.fixed + costs.transfer * generators + each_prompt * prompts


if __name__ == "__main__":
    main()
