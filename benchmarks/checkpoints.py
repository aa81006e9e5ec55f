"""What snapshots and checkpoints cost training, and how soon learners come back from memory.

    python -m benchmarks.checkpoints [--size medium] [--repeats 5]

Two learner ranks (FSDP2 over gloo, FP32 masters, one thread each) train on the CPU. The actors, snapshots and writers
are a run's. A checkpoint in the foreground, which torch's Distributed Checkpoint writes while the ranks wait, and one
in the background take turns, and so do the ways back. `blocked` is the time in which the ranks take no other call,
`slower` what updates lose beside it, because the writers use the same processors and memory.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.common import CACHE, machine, parsed, spread, write_result
from benchmarks.models import SIZES, transfer_model
from rft_cluster.algorithm import load_algorithm
from rft_cluster.cluster.handles import Learners
from rft_cluster.cluster.images import StoredImages
from rft_cluster.cluster.snapshots import Snapshots
from rft_cluster.common.files import file_sha256, unfinished
from rft_cluster.config import Config, load_config
from rft_cluster.data import load_dataset
from rft_cluster.learner.learner import Learner
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Completion, Group, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.prompts import make_prompts, render_template
from rft_cluster.run.checkpoints import NewCheckpoint, State

GOAL = 0.05  # of the write in the foreground
STORE = 9 * 10**9  # bytes of Ray's object store: three snapshots of the larger size
PROMPTS, GROUP, TOKENS = 2, 4, 16
WARM = 1


def torch_writes(learner: Any, folder: str) -> None:
    """A checkpoint in the foreground: a collective of the ranks, then each file's digest."""
    import torch.distributed.checkpoint as dcp

    from rft_cluster.learner.checkpoint import _tensors

    writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True)
    dcp.save(_tensors(learner._policy, learner._optimizer), storage_writer=writer)
    for file in Path(folder).glob(f"shard-{learner._rank + 1:05d}-*"):
        file_sha256(file)


def samples_of(config: Config, path: str, dataset: Any) -> list[TrainingSample]:
    """Made-up completions of real prompts."""
    text = render_template(config.prompt.template, config.prompt.subject, dataset.classes)
    prompts = make_prompts(dataset.train[:PROMPTS], text, "train", 0, seed=0)
    encoder = PromptEncoder(path, config.model)
    cache, draw = PromptCache(encoder, dataset.images, 0), np.random.default_rng(0)
    completions = [
        Completion(draw.integers(30, 250, TOKENS).tolist(), [-4.0] * TOKENS, "", "stop", 0) for _ in range(GROUP)
    ]
    groups = [Group(prompt, cache.encode(prompt).token_ids, completions) for prompt in prompts]
    return load_algorithm(config).samples(groups, [[1.0, -1.0, 0.5, -0.5]] * PROMPTS)


class Bench:
    """The ranks, with one state after another."""

    def __init__(self, config: Config, path: str, folder: Path) -> None:
        dataset = load_dataset(config.data, seed=0)
        self._samples, self._folder, self._step = samples_of(config, path, dataset), folder, 0
        self.snapshots, images = Snapshots(), StoredImages(dataset.images)
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        handles = {
            f"learner-{rank}": ray.remote(Learner)
            .options(num_cpus=1, runtime_env=environment)
            .remote(path, config, rank, 1, images)
            for rank in range(2)
        }
        self.learners = Learners(handles, 600)
        self.learners.join(dict.fromkeys(handles, "127.0.0.1"), 600)

    def update(self) -> float:
        began = time.perf_counter()
        stats = self.learners.start_update(self._samples, self._step, 1, 4096).wait()
        assert stats and not stats.skipped
        self._step += 1
        return time.perf_counter() - began

    def blocked(self, begin: Callable[[], object]) -> float:
        """Seconds until the ranks take the next call."""
        began = time.perf_counter()
        begin()
        self.learners.call_all("free_memory")
        return time.perf_counter() - began

    def snapshot(self) -> float:
        return self.blocked(lambda: self.snapshots.take(self.learners, self._step))

    def foreground(self) -> float:
        shutil.rmtree(self._folder / "foreground", ignore_errors=True)
        began = time.perf_counter()
        with unfinished(self._folder / "foreground") as temporary:
            self.learners.call_all("__ray_call__", torch_writes, str(temporary))
        return time.perf_counter() - began

    def background(self, update: float) -> dict[str, float]:
        """A checkpoint beside updates, which take `update` seconds alone."""
        state, begun = State(step=self._step, prompt_sha256=""), []

        def begin() -> None:
            begun.append(NewCheckpoint(self._folder, state, lambda folder, step: self._write(folder, step)))

        blocked, slower, (new,) = self.blocked(begin), 0.0, begun
        while not new.done:
            slower += self.update() - update
        seconds = new.finish()
        return {"blocked": blocked, "slower": max(0.0, slower), "files": seconds}

    def _write(self, folder: Path, step: int) -> Any:
        return self.snapshots.write(self.learners, step, folder)

    def restores(self) -> dict[str, float]:
        """Seconds until all ranks have a state again, from memory and from the newest checkpoint on the disk."""
        began = time.perf_counter()
        assert self.snapshots.restore(self.learners) == self._step
        from_memory = time.perf_counter() - began
        newest = max((self._folder / "checkpoints").iterdir())
        began = time.perf_counter()
        self.learners.restore_checkpoint(newest, self._step, self._step)
        return {"restore from memory": from_memory, "restore from disk": time.perf_counter() - began}


def measure(bench: Bench, repeats: int) -> list[dict[str, float]]:
    rounds = []
    for _ in range(WARM + repeats):
        update = min(bench.update(), bench.update())
        found = {"update": update, "checkpoint in the foreground": bench.foreground()}
        found |= {f"checkpoint in the background, {name}": value for name, value in bench.background(update).items()}
        found["snapshot, blocked"] = bench.snapshot()
        bench.update()  # the next step's, as a run would make it
        bench.snapshots.take(bench.learners, bench._step)
        while bench.snapshots.newest() != bench._step:
            time.sleep(0.01)
        rounds.append(found | bench.restores())
        print({name: round(value, 3) for name, value in rounds[-1].items()}, flush=True)
    return rounds[WARM:]


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    whole = [one["checkpoint in the foreground"] for one in rounds]
    shares = {
        name: [one[name] / write for one, write in zip(rounds, whole, strict=True)]
        for name in (
            "snapshot, blocked",
            "checkpoint in the background, blocked",
            "checkpoint in the background, slower",
        )
    }
    return {
        "seconds": {name: spread([one[name] for one in rounds]) for name in rounds[0]},
        "share_of_the_write": {name: spread(values) for name, values in shares.items()},
        "goal": GOAL,
    }


def main() -> None:
    options = parsed(__doc__, size="medium", repeats=5)
    assert options.size in SIZES, f"--size is one of {', '.join(SIZES)}"
    path, folder = str(transfer_model(CACHE, options.size)), CACHE / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    config = load_config("digits", [f"model.path={path}", "learners.count=2", "algorithm.kl_beta=0"])
    load_average = os.getloadavg()[0]
    ray.init(address="local", num_cpus=2, object_store_memory=STORE, include_dashboard=False, log_to_driver=False,
             logging_level="warning")  # fmt: skip
    bench = Bench(config, path, folder)
    result = summary(measure(bench, options.repeats))
    ray.shutdown()
    size = sum(file.stat().st_size for file in max((folder / "checkpoints").iterdir()).iterdir())
    shutil.rmtree(folder)
    result = {"machine": machine(), "ranks": 2, "bytes": size, "load_average_before": load_average, **result}
    write_result("checkpoints", result)
    print(result)


if __name__ == "__main__":
    main()
