"""G7: how long until a policy reads 60 % of the digits, ours and TRL's, three seeds.

    python -m benchmarks.digits [--seeds 0,1,2] [--goal 60]

Both start from the same small model and run `configs/digits.yaml`: same images, question, rewards, group size,
learning rate and schedule. Every `--every` steps 500 validation images are answered greedily, off the clock; the clock
begins with the first step, when all has started, and stops with the step whose policy has reached the goal. A step
during which other programs took more than 5 % of the machine counts as the median of its run's other steps.
"""

import argparse
import shutil
from statistics import median
from typing import Any

from benchmarks.common import (
    CACHE,
    EVALUATION,
    FOREIGN_LIMIT,
    NOISE_LIMIT,
    Run,
    machine,
    quiet,
    read_result,
    run,
    spread,
    write_result,
)

THREADS = 2
TIMEOUT = 1500.0
DISTURBED_LIMIT = 0.5  # share of a run's steps
TRL = {"trl": ("--weights", "mixed", "--rows", "160"), "trl-fp32": ("--weights", "fp32", "--rows", "160")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(["service", *TRL]))
    parser.add_argument("--goal", type=float, default=60.0)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--name", default="digits")
    parser.add_argument("--add", action="store_true", help="add the runs to those in the results")
    options = parser.parse_args()
    arms, seeds = options.arms.split(","), [int(seed) for seed in options.seeds.split(",")]
    runs: list[dict[str, Any]] = (read_result(options.name) or {"runs": []})["runs"] if options.add else []
    for index, seed in enumerate(seeds):
        overrides = [
            f"run.seed={seed}",
            f"schedule.steps={options.steps}",
            f"schedule.evaluate_every={options.every}",
            "schedule.save_every=0",
            "data.validation=500",
            "data.test=200",
        ]
        for arm in arms if index % 2 == 0 else arms[::-1]:
            found = {"seed": seed, "arm": arm, **measure(arm, overrides, options.goal)}
            runs.append(found)
            print({name: value for name, value in found.items() if name != "curve"}, flush=True)
            result = {"machine": machine(), "goal": options.goal, "runs": runs, **summary(runs)}
            write_result(options.name, result)


def measure(arm: str, overrides: list[str], goal: float) -> dict[str, Any]:
    for _ in range(NOISE_LIMIT):
        scratch = CACHE / "logs" / "run"
        shutil.rmtree(scratch, ignore_errors=True)
        command = ["-m", "benchmarks.trl_grpo", *TRL[arm]] if arm in TRL else ["-m", "rft_cluster.launch"]
        where = [] if arm in TRL else [f"run.folder={scratch}"]
        done = run(
            [*command, "--config", "digits", *overrides, *where], THREADS, TIMEOUT, CACHE / "logs" / f"digits-{arm}.log"
        )
        steps = done.steps(0)
        calm = quiet(steps)
        if len(calm) >= DISTURBED_LIMIT * len(steps):
            usual = median(line.seconds for line in calm)
            curve = accuracy_over_time(done, usual)
            reached = next((point for point in curve if point["accuracy"] >= goal), None)
            return {
                "step_seconds": usual,
                "disturbed_steps": len(steps) - len(calm),
                "reached_step": reached and reached["step"],
                "reached_seconds": reached and reached["seconds"],
                "curve": curve,
            }
        print(f"{arm}: other programs disturbed {len(steps) - len(calm)} of {len(steps)} steps: again", flush=True)
    raise RuntimeError(f"{NOISE_LIMIT} runs of {arm} were disturbed: measure when the machine is quiet")


def accuracy_over_time(done: Run, usual: float) -> list[dict[str, float]]:
    """Accuracy (percent) of each evaluation on the validation images, and the seconds of all steps before it."""
    clock, curve = 0.0, []
    for line in done.lines:
        if line.step is not None:
            clock += line.seconds if line.foreign <= FOREIGN_LIMIT else usual
        elif (found := EVALUATION.match(line.text)) and found[1] == "validation":
            curve.append({"step": int(found[3]), "seconds": clock, "accuracy": float(found[2])})
    return curve


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of each arm, and TRL over ours: of the medians. None where a run has not reached the goal."""
    seconds = {arm: [one["reached_seconds"] for one in runs if one["arm"] == arm] for arm in {r["arm"] for r in runs}}
    spreads = {arm: spread(values) if None not in values else None for arm, values in seconds.items()}
    ours = spreads.get("service")
    ratios = {
        arm: found.median / ours.median if found and ours else None for arm, found in spreads.items() if arm in TRL
    }
    return {"seconds": spreads, "ratios": ratios}


if __name__ == "__main__":
    main()
