"""G4: sampled tokens a second, of the service and of plain `LLM.generate`, on the same prompts.

    python -m benchmarks.generation [--sides 448,112] [--rounds 20]

The service is the real one: prompts travel to a vLLM actor through Ray, completions to the reward actor and back. The
other side is `LLM.generate` in a process that does nothing else. Both are up all the while and take turns batch by
batch. Before each of the service's batches there is a weight update with its verification, neither of them timed; the
other side drops its cached prompts then, as an update makes the service do. Two more times are recorded: of the
verification, which in training runs during generation, and of the generator's own call; the rest of a batch's time is
the service's. Two processes with the same engine differ by some percent each time: `--add` pools several sessions.
Pairs that other programs disturbed do not count.
"""

import argparse
import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

from benchmarks.speed import RAW, each_side, make_config
from benchmarks.turns import SERVICE, Arm, Enough, Rounds, Turn, comparison, serve_steps
from rft_cluster.cluster.start import start_cluster
from rft_cluster.config import Config
from rft_cluster.messages import Prompt, Sampling
from rft_cluster.prompts import make_prompts
from rft_cluster.run.task import Task, prepare

WARM = 3
TOKENS = 4 * 8 * 64


def main() -> None:
    def summary(rounds: Sequence[Mapping[str, Turn]]) -> dict[str, Any]:
        return {**comparison(rounds, RAW, SERVICE), "tokens": TOKENS}

    each_side(__doc__, in_turns, summary, rounds=20, name="generation")


def in_turns(side: int, options: argparse.Namespace) -> list[dict[str, Turn]]:
    config = make_config(side, WARM + options.rounds)
    task, sampling = prepare(config), Sampling(**config.sampling.model_dump())
    shutil.rmtree(config.run.folder, ignore_errors=True)
    plain = Arm("benchmarks.generation:serve", config)
    rounds, said = Rounds({RAW: plain}, options.rounds, WARM), []
    with start_cluster(config, str(config.model.path), task.dataset.images) as cluster, suppress(Enough):
        plain.wait_until_ready()
        for step in itertools.count():
            rounds.step_begins(step)
            prompts = prompts_of(config, task, step)
            cluster.broadcast_weights(version=step)
            sent = time.perf_counter()
            cluster.weights.wait()
            rounds.start_the_clock()
            verified = time.perf_counter()
            groups, _ = cluster.generators.start(prompts, sampling, step, cluster.reward).wait()
            seconds = time.perf_counter() - verified
            check(sum(len(completion.token_ids) for group in groups for completion in group.completions))
            (own,) = cluster.generators.call_all("__ray_call__", attrgetter("seconds"))
            said.append({"verification": verified - sent, "beside the generator": seconds - own})
    for turns, parts in zip(rounds.rounds, said, strict=True):
        turns[SERVICE].said = parts
    return rounds.counted


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
    encoder = PromptEncoder(path, config.model)
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
