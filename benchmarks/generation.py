"""G4: sampled tokens a second, of the service and of plain `LLM.generate`, on the same prompts.

    python -m benchmarks.generation [--sides 448,112] [--rounds 20]

The service is the real one: prompts travel to a vLLM actor through Ray, completions to the reward actor and back. The
other side is `LLM.generate` in a process that does nothing else. Both are up all the while and take turns batch by
batch. Each of the service's batches comes after a weight update and its proof, off the clock; the other side forgets
its earlier prompts as an update makes the service forget. Recorded are also what the proof takes, which in training
runs beside generation, and what of a batch's time is the generator's own call: the rest is the service's. Two processes
with the same engine differ by some percent, each time in another way: `--add` pools the rounds of several sessions.
Pairs that other programs disturbed do not count.
"""

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.common import Usage
from benchmarks.speed import RAW, make_config
from benchmarks.turns import SERVICE, Arm, Turn, comparison, each_side, serve_steps
from rft_cluster.cluster import start as ray_cluster
from rft_cluster.cluster.start import start_cluster
from rft_cluster.config import Config
from rft_cluster.generator.generator import Generator
from rft_cluster.messages import Group, Prompt, Sampling
from rft_cluster.prompts import make_prompts
from rft_cluster.run.task import Task, prepare

WARM = 3
TOKENS = 4 * 8 * 64


class TimedGenerator(Generator):
    """Says how long its last batch took."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        start = time.perf_counter()
        groups = super().generate(prompts, sampling, version)
        self._seconds = time.perf_counter() - start
        return groups

    def seconds(self) -> float:
        return self._seconds


def main() -> None:
    def summary(rounds: Sequence[Mapping[str, Turn]]) -> dict[str, Any]:
        return {**comparison(rounds, RAW, SERVICE), "tokens": TOKENS}

    each_side(__doc__, in_turns, summary, rounds=20, name="generation")


def in_turns(side: int, options: argparse.Namespace) -> list[dict[str, Turn]]:
    config = make_config(side, WARM + options.rounds)
    task = prepare(config)
    shutil.rmtree(config.run.folder, ignore_errors=True)
    plain = Arm("benchmarks.generation:serve", config)
    sampling = Sampling(**config.sampling.model_dump())
    counted = []
    ray_cluster.Generator = TimedGenerator  # type: ignore[misc, assignment]
    with start_cluster(config, str(config.model.path), task.dataset.images) as cluster:
        plain.wait_until_ready()
        usage = Usage()

        def serve_here(step: int) -> dict[str, float]:
            prompts = prompts_of(config, task, step)
            cluster.broadcast_weights(version=step)
            start = time.perf_counter()
            cluster.generators.call_all("generate", [], sampling, step)  # returns with the proof
            proof = time.perf_counter() - start
            usage.since_last()
            start = time.perf_counter()
            groups, _ = cluster.generators.start(prompts, sampling, step, cluster.reward).wait()
            seconds = time.perf_counter() - start
            check(sum(len(completion.token_ids) for group in groups for completion in group.completions))
            (own,) = cluster.generators.call_all("seconds")
            return {"seconds": seconds, "proof": proof, "beside the generator": seconds - own}

        for step in range(WARM + options.rounds):
            turns = {}
            for name in (SERVICE, RAW) if step % 2 else (RAW, SERVICE):
                usage.since_last()
                said = serve_here(step) if name == SERVICE else plain.turn(step)
                own, foreign = usage.since_last()
                idle = sum(used for pid, used in own.items() if (pid == plain.pid) == (name == SERVICE))
                turns[name] = Turn(said.pop("seconds"), foreign, idle, said)
            if step >= WARM:
                counted.append(turns)
    return counted


def prompts_of(config: Config, task: Task, step: int) -> list[Prompt]:
    examples = task.dataset.batch(config.run.seed, step, config.schedule.prompts_per_step)
    return make_prompts(examples, task.text, "train", step, config.run.seed)


def check(tokens: int) -> None:
    if tokens != TOKENS:
        raise SystemExit(f"{tokens} tokens were sampled, not {TOKENS}: the times mean nothing")


def serve(connection: Connection, config: Config) -> None:
    """The plain side, as an arm (see turns.py)."""
    from benchmarks.raw import RawGenerator
    from rft_cluster.model.encoder import PromptEncoder

    task, path = prepare(config), str(config.model.path)
    encoder = PromptEncoder(path, config.model.min_pixels, config.model.max_pixels)
    generator = RawGenerator(config, path, encoder, task.dataset.images)

    def step(number: int) -> dict[str, Any]:
        prompts = prompts_of(config, task, number)
        generator.forget()
        start = time.perf_counter()
        outputs = generator.generate(prompts)
        seconds = time.perf_counter() - start
        check(sum(len(answer.token_ids) for output in outputs for answer in output.outputs))
        return {"seconds": seconds}

    serve_steps(connection, step)


if __name__ == "__main__":
    main()
