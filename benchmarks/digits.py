"""G7: the time until a policy reads 60 % of the digits, for our program and TRL's, with three seeds.

    python -m benchmarks.digits [--seeds 0,1,2] [--goal 0.6]

Both start from the same small model and follow `configs/digits.yaml`: same images, question, rewards, group size,
learning rate and schedule, step by step in turns (see turns.py). Every `--every` steps each answers the same 500
validation images greedily; this is not timed. A program's time is the sum of its steps until its policy reaches the
goal, without the start-up. A turn in which other programs used more than 5 % of the machine counts as the median of the
program's other turns, if there are enough of those.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.common import CACHE, FOREIGN_LIMIT, machine, parsed, read_result, spread, write_result
from benchmarks.turns import SERVICE, Arm, Turn, run_rounds
from rft_cluster.common.hardware import native_dtype
from rft_cluster.config import load_config
from rft_cluster.run.task import base_model_path, prepare

# All completions in one forward: fastest at this size.
TRL = {"trl": ("mixed" if native_dtype("cpu") == "bfloat16" else "fp32", 160)}
ENOUGH = 10  # undisturbed turns


def main() -> None:
    options = parsed(__doc__, seeds=[0, 1, 2], rounds=60, every=4, goal=0.6, arms=list(TRL), name="digits", add=False)
    runs: list[dict[str, Any]] = (read_result(options.name) or {"runs": []})["runs"] if options.add else []
    for seed in options.seeds:
        found = measure(seed, options.rounds, options.every, options.goal, options.arms)
        runs.append({"seed": seed, **found})
        write_result(options.name, {"machine": machine(), "goal": options.goal, "runs": runs, **summary(runs)})
        said = {name: {key: own[key] for key in own if key != "curve"} for name, own in found.items()}
        print(seed, json.dumps(said), flush=True)


def measure(seed: int, rounds: int, every: int, goal: float, arms: Sequence[str]) -> dict[str, Any]:
    """Each program's seconds to the goal, and its accuracy (0 to 1) over time."""
    config = load_config(
        "digits",
        [
            f"run.folder={CACHE / 'run'}",
            f"run.seed={seed}",
            f"schedule.evaluate_every={every}",
            "schedule.save_every=0",
            "data.validation=500",
            "data.test=200",  # as many are left for the small model's warm start as in the configuration
        ],
    )
    shutil.rmtree(config.run.folder, ignore_errors=True)
    task = prepare(config)
    path = base_model_path(config, task)
    others = {arm: Arm("benchmarks.trl_grpo:serve", config, *TRL[arm]) for arm in arms}
    done = run_rounds(config, task, path, others, rounds, warm=0)
    accuracies = {
        arm: {step + 1: turns[arm].said["accuracy"] for step, turns in enumerate(done.rounds) if turns[arm].said}
        for arm in arms
    }
    evaluations = [json.loads(row) for row in (config.run_folder / "eval.jsonl").read_text().splitlines()]
    accuracies[SERVICE] = {row["step"]: row["accuracy_strict"] for row in evaluations}
    return {
        name: over_time([turns[name] for turns in done.counted], accuracies[name], goal) for name in (SERVICE, *arms)
    }


def over_time(turns: Sequence[Turn], accuracies: Mapping[int, float], goal: float) -> dict[str, Any]:
    """Seconds until each evaluation, whose steps count from 1, and until the first that has reached the goal."""
    calm = [turn.seconds for turn in turns if turn.foreign <= FOREIGN_LIMIT]
    usual = median(calm) if len(calm) >= ENOUGH else None
    clock, curve = 0.0, []
    for step, turn in enumerate(turns, start=1):
        disturbed = turn.foreign > FOREIGN_LIMIT
        clock += usual if disturbed and usual else turn.seconds
        if step in accuracies:
            curve.append({"step": step, "seconds": clock, "accuracy": accuracies[step]})
    reached = next((point for point in curve if point["accuracy"] >= goal), None)
    return {
        "reached_step": reached and reached["step"],
        "reached_seconds": reached and reached["seconds"],
        "step_seconds": usual or median(turn.seconds for turn in turns),
        "undisturbed": len(calm),
        "foreign": median(turn.foreign for turn in turns),
        "curve": curve,
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds to the goal of each program, and the others' over ours: of the medians over seeds, and of each seed."""
    names = [name for name in runs[0] if name != "seed"]
    seconds = {name: [run[name]["reached_seconds"] for run in runs] for name in names}
    if any(None in values for values in seconds.values()):
        return {"seconds": seconds}
    others = [name for name in names if name != SERVICE]
    pairs = {name: zip(seconds[name], seconds[SERVICE], strict=True) for name in others}
    return {
        "seconds": seconds,
        "ratio_of_medians": {name: median(seconds[name]) / median(seconds[SERVICE]) for name in others},
        "ratios": {name: spread([theirs / ours for theirs, ours in pairs[name]]) for name in others},
    }


if __name__ == "__main__":
    main()
