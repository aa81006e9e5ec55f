"""G1, G2: a step of the service, of TRL's GRPOTrainer, and of a plain script without a service, on the same work.

    python -m benchmarks.speed [--sides 448,112] [--repeats 5]

4 images x 8 completions x 64 tokens, one update, an 87 M model (see bench_model.py, speed.yaml): each arm in a process
of its own, in turns, from the first to the last and back. Steps that warm up, and steps during which other programs
took more than 5 % of the machine, do not count.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench_model import bench_images, bench_model
from benchmarks.common import CACHE, NOISE_LIMIT, Line, machine, quiet, read_result, run, spread, write_result

CONFIG = "benchmarks/speed.yaml"
COMPLETIONS = 32
THREADS = 2
TIMEOUT = 900.0
SKIP = {"service": 2, "raw": 2}  # vLLM's first two batches are slow; of the others one
GAP_LIMIT = 0.02  # nats a token between BF16 kernels; stale weights were 0.17
# TRL's learning in all the ways that may suit this machine; the fastest is what the service is held against.
TRL = {
    "trl": ("--weights", "mixed", "--rows", "8"),
    "trl-bf16": ("--weights", "bf16", "--rows", "8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="448,112")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--arms", default=",".join(["service", "raw", *TRL]))
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--name", default="speed")
    parser.add_argument("--add", action="store_true", help="add the repeats to those in the results")
    options = parser.parse_args()
    folder, arms = CACHE, options.arms.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"sides": {}}
    if options.add:
        result = read_result(options.name) or result
    result |= {"machine": machine(), "kl_beta": options.beta}
    for side in map(int, options.sides.split(",")):
        overrides = [
            f"model.path={bench_model(folder)}",
            f"data.path={bench_images(folder, side)}",
            f"schedule.steps={options.steps}",
            f"algorithm.kl_beta={options.beta}",
        ]
        measured = result["sides"].setdefault(str(side), {"repeats": []})
        repeats: list[dict[str, Any]] = measured["repeats"]
        for repeat in range(len(repeats), len(repeats) + options.repeats):
            order = arms if repeat % 2 == 0 else arms[::-1]
            repeats.append({arm: measure(arm, overrides, folder / "logs" / f"{side}-{repeat}-{arm}") for arm in order})
            measured |= summary(repeats)
            write_result(options.name, result)
            print(side, repeat, {arm: round(found["seconds"], 2) for arm, found in repeats[-1].items()}, flush=True)


def measure(arm: str, overrides: Sequence[str], log: Path) -> dict[str, Any]:
    """One run of an arm: `seconds` is the median of its steps that nobody disturbed. Disturbed runs are done again."""
    for attempt in range(NOISE_LIMIT):
        scratch = log.parent / "run"
        shutil.rmtree(scratch, ignore_errors=True)
        done = run(command(arm, overrides, scratch), THREADS, TIMEOUT, log.with_suffix(".log"))
        steps = done.steps(SKIP.get(arm, 1))
        if calm := quiet(steps):
            parts = [numbers(arm, line, scratch) for line in calm]
            check(arm, parts)
            return {
                "seconds": median(line.seconds for line in calm),
                "steps": [vars(line) for line in steps],
                "disturbed_runs": attempt,
                **{name: median(part[name] for part in parts) for name in parts[0]},
            }
        others = [round(line.foreign, 2) for line in steps]
        print(f"{log.name}: other programs took {others} of the machine in every step: again", flush=True)
    raise RuntimeError(f"{NOISE_LIMIT} runs of {log.name} were disturbed: measure when the machine is quiet")


def command(arm: str, overrides: Sequence[str], scratch: Path) -> list[str]:
    match arm:
        case "service":
            return ["-m", "rft_cluster.launch", "--config", CONFIG, f"run.folder={scratch}", *overrides]
        case "raw":
            return ["-m", "benchmarks.raw", "--config", CONFIG, *overrides]
        case _:
            return ["-m", "benchmarks.trl_grpo", "--config", CONFIG, *TRL[arm], *overrides]


def numbers(arm: str, line: Line, scratch: Path) -> dict[str, float]:
    """What a step says of its parts: seconds of each, and the gap of its log-probabilities."""
    if arm == "raw":
        found = {name: float(value) for name, value in re.findall(r"(\w+) (\d+\.\d+)", line.text)}
        return {name: found[name] for name in ("generate", "learn", "copy", "gap")}
    if arm == "service":
        rows = [json.loads(row) for row in (scratch / "speed" / "metrics.jsonl").read_text().splitlines()]
        row = rows[line.step - 1]
        seconds = {name.removeprefix("seconds/"): row[name] for name in row if name.startswith("seconds/")}
        return {**seconds, "gap": row["logprob_gap"], "tokens": row["tokens"]}
    return {}


def check(arm: str, parts: Sequence[dict[str, float]]) -> None:
    """Nothing is timed whose log-probabilities are not those of the engine."""
    worst = max((part["gap"] for part in parts if "gap" in part), default=0.0)
    if worst > GAP_LIMIT:
        raise RuntimeError(f"{arm}: learner and generator differ by {worst} nats a token: the timing means nothing")


def summary(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every arm's samples a second, and the ratios of arms that ran in the same turn."""
    found: dict[str, Any] = {
        "samples_per_second": {
            arm: spread([COMPLETIONS / repeat[arm]["seconds"] for repeat in repeats]) for arm in repeats[0]
        }
    }
    peers = [arm for arm in repeats[0] if arm in TRL]
    if peers and "service" in repeats[0]:
        found["speedup"] = {
            arm: spread([repeat[arm]["seconds"] / repeat["service"]["seconds"] for repeat in repeats]) for arm in peers
        }
        found["g1"] = min(found["speedup"].values(), key=lambda one: one.median)
    if {"service", "raw"} <= set(repeats[0]):
        floor = [sum(repeat["raw"][part] for part in ("generate", "learn", "copy")) for repeat in repeats]
        found["raw_floor"] = spread(floor)
        found["g2"] = spread(
            [seconds / repeat["service"]["seconds"] for seconds, repeat in zip(floor, repeats, strict=True)]
        )
    return found


if __name__ == "__main__":
    main()
