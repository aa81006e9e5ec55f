"""G4: sampled tokens a second, of the service and of plain `LLM.generate`, on the same prompts.

    python -m benchmarks.generation [--sides 448,112] [--repeats 20]

The service is the real one: prompts travel to a vLLM actor through Ray, completions to the reward actor and back. The
other side is `LLM.generate` in a process that does nothing else. Both are up all the while and take turns batch by
batch, first one, then the other. Each batch comes after a weight update in the service, off the clock; the other side
forgets its earlier prompts as an update makes the service forget. Pairs that other programs disturbed do not count.
"""

import argparse
import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.bench_model import SIDES, bench_images, bench_model
from benchmarks.common import CACHE, FOREIGN_LIMIT, Usage, environment, machine, spread, write_result
from rft_cluster.cluster import Cluster, start_cluster
from rft_cluster.config import Config, load_config
from rft_cluster.generator import Sampling
from rft_cluster.messages import Prompt
from rft_cluster.prepare import prepare
from rft_cluster.prompts import make_prompts

THREADS = 2
WARM = 3  # pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(map(str, SIDES)))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    os.environ.update(environment(THREADS))  # for the processes that are started here
    CACHE.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "prompts": options.prompts, "sides": {}}
    for side in map(int, options.sides.split(",")):
        scratch = CACHE / "logs" / "run"
        shutil.rmtree(scratch, ignore_errors=True)
        config = load_config(
            "benchmarks/speed.yaml",
            [
                f"run.folder={scratch}",
                f"model.path={bench_model(CACHE)}",
                f"data.path={bench_images(CACHE, side)}",
                f"schedule.prompts_per_step={options.prompts}",
            ],
        )
        result["sides"][side] = in_turns(config, options.repeats)
        write_result("generation", result)
        print(side, {name: value for name, value in result["sides"][side].items() if name != "pairs"}, flush=True)


def in_turns(config: Config, repeats: int) -> dict[str, Any]:
    """Tokens a second of both sides, and service / plain, of `repeats` pairs."""
    task = prepare(config)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    plain = multiprocessing.get_context("spawn").Process(target=serve_plainly, args=(config, theirs), daemon=True)
    plain.start()
    pairs = []
    with start_cluster(config, str(config.model.path)) as cluster:
        usage = Usage(os.getpid())
        for index in range(WARM + repeats):
            examples = task.dataset.batch(config.run.seed, index, config.schedule.prompts_per_step)
            prompts = make_prompts(examples, task.text, "train", index, config.run.seed)
            cluster.broadcast_weights(version=index)
            usage.since_last()
            pair: dict[str, Any] = {}
            for side in ("service", "plain") if index % 2 else ("plain", "service"):
                if side == "service":
                    tokens, seconds = generate(cluster, config, prompts, index)
                else:
                    ours.send(prompts)
                    tokens, seconds = ours.recv()
                pair[side], pair["tokens"] = seconds, tokens
            pair["foreign"] = usage.since_last()[2]
            if index >= WARM:
                pairs.append(pair)
    ours.send(None)
    plain.join()
    calm = [pair for pair in pairs if pair["foreign"] <= FOREIGN_LIMIT]
    if not calm:
        raise RuntimeError("other programs disturbed every pair: measure when the machine is quiet")
    return {
        "service": spread([pair["tokens"] / pair["service"] for pair in calm]),
        "plain": spread([pair["tokens"] / pair["plain"] for pair in calm]),
        "ratio": spread([pair["plain"] / pair["service"] for pair in calm]),
        "pairs": pairs,
    }


def generate(cluster: Cluster, config: Config, prompts: list[Prompt], version: int) -> tuple[int, float]:
    """Tokens and seconds of a batch, rewards included."""
    start = time.perf_counter()
    groups, _ = cluster.generators.start(
        prompts, Sampling(**config.sampling.model_dump()), version, cluster.reward
    ).wait()
    seconds = time.perf_counter() - start
    return sum(len(completion.token_ids) for group in groups for completion in group.completions), seconds


def serve_plainly(config: Config, parent: Connection) -> None:
    """Answers batches of prompts with (tokens, seconds) until it gets None."""
    from benchmarks.raw import RawGenerator
    from rft_cluster.qwen2vl import PromptEncoder

    path = str(config.model.path)
    generator = RawGenerator(config, path, PromptEncoder(path, config.model.min_pixels, config.model.max_pixels))
    while prompts := parent.recv():
        generator.forget()
        start = time.perf_counter()
        outputs = generator.generate(prompts)
        seconds = time.perf_counter() - start
        parent.send((sum(len(answer.token_ids) for output in outputs for answer in output.outputs), seconds))


if __name__ == "__main__":
    main()
