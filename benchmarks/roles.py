"""A step of the loop on roles that sleep: how much of it overlaps, and what the controller costs.

    python -m benchmarks.roles [--parts overlap,controller] [--generators 4,16] [--learners 2,8] [--prompts 16,64]

Roles take time as devices would, but compute nothing. All else is real: the loop, Ray's actors and queues, prompts,
groups, rewards, samples and calls are the ones of a run. So what a step takes beyond the roles' sleep is the
service's own cost, and overlap can be shown on two cores, on which real roles would only take turns.

`overlap`: G3, max(generate, learn) / wall with `schedule.max_staleness`. 1 would be a step in which the slower role
never waits. Beside it the same with strictly alternating roles.

`controller`: a step's wall time beyond the roles' own, with strictly alternating roles: work that the driver does while
a role sleeps is not in it. Each generator and each learner is a process of its own. A prompt has 8 completions. What is
left of the wall time is the driver, Ray, and, where more processes than cores must be woken, the machine itself. So the
processor time of the driver's process, Ray's threads in it included, and of its thread that runs the loop, stand beside
it, and the stages in which the time is spent. A step counts if other programs used less than 5 % of the machine, unless
fewer than 5 steps would be left.
"""

import argparse
import io
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import psutil
import ray
from PIL import Image

from benchmarks.common import FOREIGN_LIMIT, Spread, machine, parsed, spread, write_result
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.handles import ActorGroup, Learners, RewardActor
from rft_cluster.cluster.placement import plan_actors
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.config import Config, load_config
from rft_cluster.data import FewShotDataset, LabelledImage
from rft_cluster.learner.snapshot import Snapshot
from rft_cluster.messages import Completion, Group, LearnerStats, Prompt, WeightRecord
from rft_cluster.prompts import Question
from rft_cluster.rewards.scorer import Scorer
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.metrics import StepStats
from rft_cluster.run.task import Task
from rft_cluster.train import train
from rft_cluster.weights.digests import combined_digest
from rft_cluster.weights.sender import WeightOffer


@dataclass(frozen=True)
class Seconds:
    """Seconds of each role's own work in a step."""

    generate: float
    learn: float
    transfer: float


# Roles' seconds a step, and the values of max_staleness to measure.
CASES = {
    "equal": (Seconds(2.0, 2.0, 0.02), (0, 1, 2)),
    "learning longer": (Seconds(1.0, 2.0, 0.02), (1,)),
    "generating longer": (Seconds(2.0, 1.0, 0.02), (1,)),
}
SKIPPED = 2  # steps until the pipeline is full
ROLES = ["schedule.evaluate_every=0", "schedule.save_every=1000", "optimizer.warmup_steps=0", "data.test=0",
         "data.validation=0", "generators.count=4", "learners.count=2", "schedule.prompts_per_step=16",
         "generators.max_concurrent=2048"]  # fmt: skip
SECONDS, STEPS = Seconds(0.25, 0.25, 0.0), 20  # of the controller's steps: what a small run may take on 8 GPUs
OWN = asdict(SECONDS)  # by stage of the loop
LEAST = 5  # steps in quiet; if there are fewer, all steps count
PROMPT_TOKENS, COMPLETION_TOKENS = 600, 64  # of the published recipe
DRAW = random.Random(0)
WRITTEN = [
    ([DRAW.randrange(150_000) for _ in range(COMPLETION_TOKENS)], [-DRAW.random() for _ in range(COMPLETION_TOKENS)])
    for _ in range(64)
]


class EmulatedGenerator:
    """One engine, whose device does one call's work after another's; an update holds it up."""

    def __init__(self, seconds: Seconds) -> None:
        self._seconds, self._version = seconds, 0
        self._updating, self._whole, self._device = threading.Event(), threading.Event(), threading.Lock()

    def generate(self, prompts: Sequence[Prompt], sampling: Any, version: int) -> list[Group]:
        if version > self._version:
            raise RuntimeError(f"asked for version {version}, holds {self._version}")
        with self._device:
            start = time.monotonic()
            groups = [_group(prompt, sampling.group_size, version) for prompt in prompts]
            left = self._seconds.generate - (time.monotonic() - start)
            while left > 0:
                start = time.monotonic()
                held_up = self._updating.wait(left)
                left -= time.monotonic() - start
                if held_up:
                    self._whole.wait()
        return groups

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def load_weights(self, update_info: dict[str, Any], version: int, data: Any) -> None:
        self._whole.clear()
        self._updating.set()
        time.sleep(self._seconds.transfer)
        self._version = version
        self._updating.clear()
        self._whole.set()

    def verify_weights(self, version: int, *digests: dict[str, int]) -> WeightRecord:
        return WeightRecord(version, combined_digest({}), 0)


def _group(prompt: Prompt, size: int, version: int) -> Group:
    """Completions drawn from `WRITTEN`, in lists of their own, as an engine's are: a device would have made them."""
    draw = random.Random(prompt.seed)
    completions = []
    for token_ids, logprobs in draw.choices(WRITTEN, k=size):
        text = f"<think>petals</think><answer>{draw.choice(['rose', 'tulip'])}</answer>"
        completions.append(Completion(list(token_ids), list(logprobs), text, "stop", version))
    return Group(prompt, list(range(PROMPT_TOKENS)), completions)


class EmulatedLearner:
    def __init__(self, seconds: Seconds, rank: int) -> None:
        self._seconds, self._rank = seconds, rank

    def update(self, work: Any, step: int) -> LearnerStats:
        time.sleep(self._seconds.learn)
        lengths = (len(sample.token_ids) for update in work for batch in update for sample in batch)
        return LearnerStats(tokens=sum(lengths))

    def offer_weights(self, generator_ranks: int) -> WeightOffer:
        return WeightOffer({}, {}, 0)

    def connect_weights(self, forward: Any) -> None:
        pass

    def publish_weights(self) -> None:
        pass  # a generator's `load_weights` takes the time

    def weight_digests(self) -> dict[str, int]:
        return {}

    def snapshot(self, step: int) -> tuple[Snapshot, int]:
        return Snapshot(self._rank, step, step, {}), step

    def export(self, folder: str) -> None:
        Path(folder, "nothing").touch()


class EmulatedCluster:
    """A `cluster` whose generators and learners sleep, and whose rewards are scored as ever. Started once."""

    def __init__(self, config: Config, seconds: Seconds) -> None:
        learners, generators, _ = plan_actors(config)
        light = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        generator_handles = {
            name: ray.remote(EmulatedGenerator).options(max_concurrency=8, **light).remote(seconds)
            for name in generators.names
        }
        learner_handles = {
            name: ray.remote(EmulatedLearner).options(**light).remote(seconds, rank)
            for rank, name in enumerate(learners.names)
        }
        reward = ray.remote(Scorer).options(**light).remote(config.rewards, config.scoring, {})
        self._handles = [*generator_handles.values(), *learner_handles.values(), reward]
        ray.get([handle.__ray_ready__.remote() for handle in self._handles], timeout=600)
        members = Learners(learner_handles, 600)
        weights = WeightSync(members, ActorGroup(generator_handles, 600), "shared_memory", tensor_parallel=1)
        weights.connect(dict.fromkeys([*learner_handles, *generator_handles], "here"))
        self.cluster = Cluster(
            Generators(generator_handles, 600, config.generators.max_concurrent, weights.verify),
            RewardActor({"reward": reward}, 600),
            members,
            weights,
            config,
        )

    def close(self) -> None:
        for handle in self._handles:
            ray.kill(handle)


def dataset(count: int) -> FewShotDataset:
    """Training images of one colour each: prompts hold references, and the bytes move once a run, in no step."""
    images = []
    for i in range(count):
        Image.new("RGB", (28, 28), (i, i, i)).save(file := io.BytesIO(), "PNG")
        images.append(LabelledImage(f"photos/{i}", file.getvalue(), ("rose", "tulip")[i % 2]))
    return FewShotDataset.of("emulated", ["rose", "tulip"], images, [], [], [])


@dataclass(frozen=True)
class Clocks:
    """Seconds by the clock, and of processors: the driver's process, its loop's thread, all of ours, all programs."""

    wall: float
    driver: float
    loop: float
    ours: float
    busy: float


class Processes:
    """Reads the clocks of this process and of Ray's processes, which must have been started."""

    def __init__(self) -> None:
        self._processes = psutil.Process().children(recursive=True)

    def clocks(self) -> Clocks:
        wall, driver, loop = time.monotonic(), time.process_time(), time.thread_time()
        ours = driver
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):  # it ends meanwhile
                if process.is_running():  # and is not another with its number
                    used = process.cpu_times()
                    ours += used.user + used.system
        total = psutil.cpu_times()
        return Clocks(wall, driver, loop, ours, sum(total) - total.idle - total.iowait)


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step: by the clock, of the driver's process, of the loop's thread, and of its stages.

    `foreign`: the share of the machine that other programs used.
    """

    wall: float
    driver: float
    loop: float
    stages: dict[str, float]
    foreign: float


class TimedRun(RunFolder):
    """Takes the time of steps, from record to record. Reading the clocks of many processes takes no step's time."""

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        self._processes = Processes()
        self._began: tuple[float, Clocks] | None = None
        self.steps: list[StepSeconds] = []

    def log_step(self, stats: StepStats) -> None:
        start = time.monotonic()
        super().log_step(stats)
        now = self._processes.clocks()
        if self._began:
            began, then = self._began
            wall, stages = now.wall - began, {**stats.seconds, "log": now.wall - start}
            others = now.busy - then.busy - (now.ours - then.ours)
            foreign = max(0.0, others / ((now.wall - then.wall) * (psutil.cpu_count() or 1)))
            rest = wall - sum(stages.values())
            self.steps.append(
                StepSeconds(wall, now.driver - then.driver, now.loop - then.loop, {"rest": rest, **stages}, foreign)
            )
        self._began = (time.monotonic(), now)


def run_steps(overrides: list[str], cluster: EmulatedCluster) -> list[StepSeconds]:
    """The steps of `train` from when the pipeline is full to its end."""
    task = Task(dataset(64), Question("Which flower?"))
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("digits", [f"run.folder={folder}", "run.name=emulated", *overrides])
        run = TimedRun(config, task)
        train(config, task, cluster.cluster, run)
    return run.steps[SKIPPED - 1 :]


def overlap(options: argparse.Namespace) -> None:
    rows = []
    for name, (seconds, values) in CASES.items():
        cluster = EmulatedCluster(load_config("digits", ROLES), seconds)
        measured: dict[int, list[float]] = {value: [] for value in values}
        for repeat in range(options.repeats):
            for value in values:  # in turns
                changes = [f"run.seed={repeat}", f"schedule.steps={options.steps}", f"schedule.max_staleness={value}"]
                wall = fmean(step.wall for step in run_steps([*ROLES, *changes], cluster))
                measured[value].append(max(seconds.generate, seconds.learn) / wall)
        cluster.close()
        for value, ratios in measured.items():
            rows.append({"case": name, **asdict(seconds), "max_staleness": value, "ratio": asdict(spread(ratios))})
            print(json.dumps(rows[-1]), flush=True)
    write_result("overlap", {"machine": machine(), "steps": options.steps, "rows": rows})


def goal_ms(generators: int, prompts: int, learners: int) -> float:
    """The most that a step may take beyond its roles, on two cores."""
    return 15 + 1.5 * generators + 0.3 * prompts + 0.5 * learners


def controller(options: argparse.Namespace) -> None:
    result: dict[str, Any] = {"machine": machine(), "role_seconds": OWN, "steps": STEPS, "rows": []}
    for generators, learners in itertools.product(options.generators, options.learners):
        roles = [*ROLES, f"generators.count={generators}", f"learners.count={learners}"]
        cluster = EmulatedCluster(load_config("digits", roles), SECONDS)
        for prompts in options.prompts:
            changes = [f"schedule.prompts_per_step={prompts}", f"schedule.steps={STEPS}"]
            steps = run_steps([*roles, *changes], cluster)
            case = {"generators": generators, "learners": learners, "prompts": prompts}
            result["rows"].append({**case, "goal_ms": goal_ms(**case), **milliseconds(steps)})
            print(json.dumps(result["rows"][-1]), flush=True)
            write_result(options.out, result)
        cluster.close()


def milliseconds(steps: Sequence[StepSeconds]) -> dict[str, Any]:
    """A step's milliseconds beyond the roles' own: medians and quartiles of the steps that count."""
    quiet = [step for step in steps if step.foreign < FOREIGN_LIMIT]
    counted = quiet if len(quiet) >= LEAST else steps
    return {
        "counted": len(counted),
        "foreign": median(step.foreign for step in counted),
        "beyond_roles_ms": quartiles([1000 * (step.wall - sum(OWN.values())) for step in counted]),
        "driver_cpu_ms": median(1000 * step.driver for step in counted),
        "loop_cpu_ms": median(1000 * step.loop for step in counted),
        "stages_ms": {
            name: median(1000 * (step.stages[name] - OWN.get(name, 0.0)) for step in counted)
            for name in counted[0].stages
        },
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return asdict(Spread(middle, low, high, len(values)))


def main() -> None:
    options = parsed(
        __doc__,
        parts=["overlap", "controller"],
        generators=[4, 16, 64],
        learners=[2, 8],
        prompts=[16, 64, 256],
        steps=6,
        repeats=5,
        out="controller",
    )
    ray.init(address="local", num_cpus=128, log_to_driver=False, logging_level="warning", include_dashboard=False)
    for part in options.parts:
        {"overlap": overlap, "controller": controller}[part](options)


if __name__ == "__main__":
    main()
