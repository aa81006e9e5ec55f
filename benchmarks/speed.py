"""G1, G2: a step of the service, of TRL's GRPOTrainer, and of a plain script without a service, on the same work.

    python -m benchmarks.speed [--sides 448,112] [--rounds 6]

4 images x 8 completions x 64 tokens, one update, an 87 M model (see models.py, speed.yaml), in turns (turns.py). A
round is a repeat; those that other programs disturbed, by more than 5 % of the machine, do not count.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.common import CACHE, machine, parsed, read_result, write_result
from benchmarks.models import SIDES, bench_images, bench_model
from benchmarks.turns import SERVICE, Arm, Turn, comparison, run_rounds
from rft_cluster.common.hardware import native_dtype
from rft_cluster.config import Config, load_config
from rft_cluster.run.task import prepare

COMPLETIONS = 32
WARM = 2  # rounds: vLLM's first two batches are slow
GAP_LIMIT = 0.02  # nats a token between BF16 kernels; stale weights were 0.17
RAW = "plain"
# TRL's weights and rows in a forward, by what layers compute in: in our precision, and in BF16 alone where that is
# fast. The fastest is what the service is held against. (More rows of large images and all others exceed 24 GB.)
PEERS = {"bfloat16": {"trl": ("mixed", 8), "trl-bf16": ("bf16", 16)}, "float32": {"trl": ("fp32", 8)}}
TRL = PEERS[native_dtype("cpu")]


def main() -> None:
    each_side(__doc__, measure, summary, rounds=6, arms=[RAW, *TRL], name="speed")


def each_side(
    doc: str | None,
    measure: Callable[[int, argparse.Namespace], Sequence[Mapping[str, Turn]]],
    summary: Callable[[Sequence[Mapping[str, Turn]]], dict[str, Any]],
    **defaults: Any,
) -> None:
    """The main function of a benchmark on images of several `--sides`. `measure` makes `--rounds` on one; with `--add`
    they are pooled with those in the result `--name`, which gets `summary`'s figures of all."""
    options = parsed(doc, sides=list(SIDES), add=False, **defaults)
    CACHE.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = (read_result(options.name) if options.add else None) or {"sides": {}}
    result["machine"] = machine()
    for side in options.sides:
        measured = result["sides"].setdefault(str(side), {"rounds": []})
        new = measure(side, options)
        measured["rounds"] += [{name: asdict(turn) for name, turn in turns.items()} for turns in new]
        found = summary([{name: Turn(**turn) for name, turn in turns.items()} for turns in measured["rounds"]])
        measured |= found
        write_result(options.name, result)
        print(side, found, flush=True)


def make_config(side: int, steps: int, *changes: str) -> Config:
    paths = {"run.folder": CACHE / "run", "model.path": bench_model(CACHE), "data.path": bench_images(CACHE, side)}
    overrides = [f"{key}={path}" for key, path in paths.items()]
    # The last step is never made: the rounds are over when it begins.
    return load_config("benchmarks/speed.yaml", [*overrides, f"schedule.steps={steps + 1}", *changes])


def measure(side: int, options: argparse.Namespace) -> list[dict[str, Turn]]:
    """The reports of all programs on the counted rounds; for the service, the stages in its metrics."""
    config = make_config(side, WARM + options.rounds)
    shutil.rmtree(config.run.folder, ignore_errors=True)
    others = {}
    for arm in options.arms:
        serving = ("benchmarks.raw:serve", config) if arm == RAW else ("benchmarks.trl_grpo:serve", config, *TRL[arm])
        others[arm] = Arm(*serving)
    done = run_rounds(config, prepare(config), str(config.model.path), others, options.rounds, WARM)
    for turns, row in zip(done.rounds, (config.run_folder / "metrics.jsonl").read_text().splitlines(), strict=False):
        metrics = json.loads(row)
        stages = {name.removeprefix("seconds/"): metrics[name] for name in metrics if name.startswith("seconds/")}
        turns[SERVICE].said = {**stages, "gap": metrics["logprob_gap"], "tokens": metrics["tokens"]}
    worst = max(turn.said.get("gap", 0.0) for turns in done.counted for turn in turns.values())
    if worst > GAP_LIMIT:
        raise SystemExit(f"learner and generator differ by {worst} nats a token: the times mean nothing")
    return done.counted


def summary(rounds: Sequence[Mapping[str, Turn]]) -> dict[str, Any]:
    """Each program against the service: see `turns.comparison`. `g1`, `g2`: the goals' ratios."""
    against = {
        name: comparison(rounds, name, SERVICE) for name in (RAW, *TRL) if any(name in turns for turns in rounds)
    }
    found: dict[str, Any] = {"completions": COMPLETIONS, "against": against}
    if RAW in against:
        found["g2"] = against[RAW]["ratio"]
    if peers := [against[name]["ratio"] for name in against if name in TRL]:
        found["g1"] = min(peers, key=lambda ratio: ratio.median)
    return found


if __name__ == "__main__":
    main()
