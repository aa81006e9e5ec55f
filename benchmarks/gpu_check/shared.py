"""The tier *shared*: generator and learner on one GPU, through the real cluster and the real training loop.

Three GRPO steps of `flower102_1gpu`, from random weights on pictures of noise, rewarded so that every group teaches
something. One run; the checks look at its records. On CPUs the roles have processors of their own.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from threading import Event, Thread
from typing import Any, cast

import psutil
from typing_extensions import override

from benchmarks.common import megabytes, memory_of, nvidia_gpus
from benchmarks.gpu_check.checklist import Bench, Check, Outcome, once
from benchmarks.gpu_check.material import SIZES, images, run_config
from benchmarks.turns import Enough, TurnTaking
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.handles import Update
from rft_cluster.cluster.start import start_cluster
from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config
from rft_cluster.data import LabelledImage
from rft_cluster.messages import TrainingSample
from rft_cluster.prompts import Question
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.task import Task
from rft_cluster.train import train

STEPS = 3
NATS = 0.05  # log-prob gap; see the tier *generator*
CARD = 0.98  # share of the memory that may be used
PERIOD = 0.2  # seconds between looks at the memory
GIB = 2**30
FEWER: dict[str, tuple[str, ...]] = {"true": (), "tiny": ("schedule.prompts_per_step=3",)}
PHASES = ("generate", "learn", "transfer")


@dataclass(frozen=True)
class Run:
    """The records of the run.

    `rows`: those of metrics.jsonl. `peaks`: GiB in use, by phase. `loaded`: digests of each generator's own parameters,
    before the first step and after the last. `held`: the version that each generator was verified to hold.
    """

    transfer: str
    start_seconds: float
    rows: list[dict[str, Any]]
    peaks: Mapping[str, float]
    loaded: tuple[list[int], list[int]]
    held: Mapping[str, int]


@once
def run(bench: Bench) -> Run:
    return steps_of(bench, "shared")


def steps_of(bench: Bench, name: str, *changes: str) -> Run:
    """Run `STEPS` steps of a configuration that departs from `flower102_1gpu` in `changes`. `name`: of its folder."""
    chosen = ("data.validation=0", "data.test=0", f"run.name={name}", f"run.folder={bench.folder}", *FEWER[bench.size])
    config = run_config(bench, *chosen, *changes)
    config = config.model_copy(update={"rewards": {"benchmarks.rewards:spread": 1.0}})
    shutil.rmtree(config.run_folder, ignore_errors=True)
    task = made_task(bench, config)
    started = time.perf_counter()
    actors = start_cluster(config, str(config.model.path), task.dataset.images)
    with memory_watched(bench.device) as gauge, actors as cluster:
        seconds = time.perf_counter() - started
        watched = Watched(cluster, gauge)
        with suppress(Enough):
            train(config, task, watched, RunFolder(config, task))
        loaded = watched.first, loaded_weights(cluster, STEPS)
        held = dict(cluster.weights.held)
    rows = [json.loads(row) for row in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    devices = hardware(config.cluster.device, config.cluster.dtype, config.shares_gpus)
    return Run(devices.transfer, seconds, rows, gauge.peaks, loaded, held)


def made_task(bench: Bench, config: Config) -> Task:
    """The size's question about pictures of noise, each seen once. Ends the training when `STEPS` steps are done."""
    asked = STEPS + config.schedule.max_staleness  # prefetch asks for the prompts of later steps

    def step_begins(step: int) -> None:
        if step == asked:
            raise Enough

    count = asked * config.schedule.prompts_per_step
    labels = ("rose", "tulip")
    pictures = [
        LabelledImage(f"noise/{i}", image, labels[i % 2]) for i, image in enumerate(images(bench, count).values())
    ]
    dataset = TurnTaking.of("noise", list(labels), pictures, [], [], [])
    return Task(replace(cast(TurnTaking, dataset), step_begins=step_begins), Question(SIZES[bench.size].question))


class Watched(Cluster):
    """A started cluster that says in which phase it is."""

    def __init__(self, cluster: Cluster, gauge: "Gauge") -> None:
        self.__dict__.update(vars(cluster))
        self._gauge = gauge
        self.first: list[int] = []

    @override
    def start_update(self, samples: Sequence[TrainingSample], step: int) -> Update:
        self._gauge.enter("learn")
        return super().start_update(samples, step)

    @override
    def broadcast_weights(self, version: int) -> None:
        self._gauge.enter("transfer")
        super().broadcast_weights(version)
        self._gauge.enter("generate")
        if version == 0:  # before the first step, so in no step's time
            self.first = loaded_weights(self, version)


def loaded_weights(cluster: Cluster, version: int) -> list[int]:
    """Verify the served weights once more. Returns a digest of each generator's own parameters."""
    cluster.weights.wait()
    sent = cluster.learners.call_all("weight_digests")
    return [record.loaded for record in cluster.generators.call_all("verify_weights", version, *sent)]


# Memory


@dataclass
class Gauge:
    """Looks at the memory in use every `PERIOD`, and keeps the peak of each phase, in GiB."""

    used: Callable[[], float]
    phase: str = "start"
    peaks: dict[str, float] = field(default_factory=dict)

    def look(self) -> None:
        phase, used = self.phase, self.used()
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), used)

    def enter(self, phase: str) -> None:
        self.look()
        self.phase = phase


@contextmanager
def memory_watched(device: str) -> Iterator[Gauge]:
    gauge, ended = Gauge(card_memory if device == "cuda" else partial(process_memory, os.getpid())), Event()

    def look() -> None:
        while not ended.wait(PERIOD):
            gauge.look()

    looking = Thread(target=look, name="memory", daemon=True)
    looking.start()
    try:
        yield gauge
    finally:
        ended.set()
        looking.join()


def card_memory() -> float:
    """GiB in use on the fullest GPU, by nvidia-smi: of all processes, with their contexts."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    host = psutil.virtual_memory().used / 2**20
    return max(megabytes(line, host) for line in said.splitlines()) / 1024


def process_memory(pid: int) -> float:
    return memory_of(pid) / GIB


def whole_memory(device: str) -> float:
    """GiB of the card, or of a machine without one."""
    return max(gpu["memory_gib"] for gpu in nvidia_gpus()) if device == "cuda" else psutil.virtual_memory().total / GIB


# The checks


def start(bench: Bench) -> Outcome:
    return Outcome(True, run(bench).start_seconds, "s")


def transfer(bench: Bench) -> Outcome:
    return transferred(run(bench), "ipc" if bench.device == "cuda" else "shared_memory")


def transferred(found: Run, expected: str) -> Outcome:
    """The learners' weights are in the generators, verified, by the `expected` way, and are not the first ones."""
    version = min(found.held.values(), default=0)
    moved = all(before != after for before, after in zip(*found.loaded, strict=True))
    seconds = median(row["seconds/transfer"] for row in found.rows)
    note = f"by {found.transfer}, {seconds:.2f} s" + ("" if moved else "; the engine's parameters never changed")
    return Outcome(found.transfer == expected and version == STEPS and moved, version, "", note)


def logprob_gap(bench: Bench) -> Outcome:
    return gap_of(run(bench))


def gap_of(found: Run) -> Outcome:
    gap = max(row["logprob_gap"] for row in found.rows)
    return Outcome(gap <= NATS, gap, "nats")


def updates(bench: Bench) -> Outcome:
    """Each step made its update, and its gradient was neither 0 nor infinite."""
    rows = run(bench).rows
    made = sum(row.get("skipped") == 0 and row["grad_norm"] > 0 for row in rows)
    return Outcome(made == STEPS, made, "updates", f"gradient {max(row.get('grad_norm', 0.0) for row in rows):.3g}")


def memory(bench: Bench, phase: str) -> Outcome:
    peak, whole = run(bench).peaks[phase], whole_memory(bench.device)
    return Outcome(peak <= CARD * whole, peak, "GiB", f"of {whole:.1f}")


def own_peak(bench: Bench) -> Outcome:
    """The learner's allocator alone."""
    rows = run(bench).rows
    return Outcome(True, max(row["memory_gib"] for row in rows), "GiB", f"first step {rows[0]['memory_gib']:.1f}")


def seconds(bench: Bench) -> Outcome:
    """Of the steps after the first, which warms up."""
    rows = run(bench).rows[1:]
    tokens = median(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    return Outcome(True, median(map(whole_step, rows)), "s", f"{tokens:.0f} tokens/s")


def share(bench: Bench, phase: str) -> Outcome:
    rows = run(bench).rows[1:]
    part = median(row[f"seconds/{phase}"] / whole_step(row) for row in rows)
    return Outcome(True, 100 * part, "%", f"{median(row[f'seconds/{phase}'] for row in rows):.2f} s")


def whole_step(row: Mapping[str, Any]) -> float:
    return sum(row[f"seconds/{phase}"] for phase in PHASES)


CHECKS = (
    Check("start: engine, learner, reward", "measured", start),
    Check("transfer: version held, verified", f"{STEPS}, by CUDA IPC on a GPU", transfer),
    Check("steps: log-prob gap", f"at most {NATS} nats", logprob_gap),
    Check("steps: updates made", str(STEPS), updates),
    *(
        Check(f"memory: {phase}", f"at most {100 * CARD:.0f} % of the card", partial(memory, phase=phase))
        for phase in PHASES
    ),
    Check("memory: the learner's own peak", "measured", own_peak),
    Check("seconds a step", "measured", seconds),
    *(Check(f"share of a step: {phase}", "measured", partial(share, phase=phase)) for phase in PHASES),
)
