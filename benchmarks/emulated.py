"""Roles that take time as devices would, but compute nothing: they sleep. Everything else is real.

The loop, Ray's actors and queues, prompts with images, groups, rewards, samples and calls are the ones of a run; only
vLLM's, FSDP's and the transfer's own work is a sleep of known length. So what a step takes beyond that is the
service's own cost, and overlap can be shown on two cores, on which real roles would only take turns.
"""

import io
import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from PIL import Image

from rft_cluster.config import Config
from rft_cluster.data import FewShotDataset, LabelledImage
from rft_cluster.messages import Completion, Group, LearnerStats, Prompt, WeightRecord
from rft_cluster.weights.digests import combined_digest
from rft_cluster.weights.sender import WeightOffer

PROMPT_TOKENS, COMPLETION_TOKENS = 600, 64  # of the published recipe


@dataclass(frozen=True)
class Seconds:
    """What each role's own work takes, a step."""

    generate: float
    learn: float
    transfer: float


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
    draw = random.Random(prompt.seed)
    completions = [
        Completion(
            [draw.randrange(150_000) for _ in range(COMPLETION_TOKENS)],
            [-draw.random() for _ in range(COMPLETION_TOKENS)],
            f"<think>petals</think><answer>{draw.choice(['rose', 'tulip'])}</answer>",
            "stop",
            version,
        )
        for _ in range(size)
    ]
    return Group(prompt, list(range(PROMPT_TOKENS)), completions)


class EmulatedLearner:
    def __init__(self, seconds: Seconds) -> None:
        self._seconds = seconds

    def update(self, work: Any, step: int) -> LearnerStats:
        time.sleep(self._seconds.learn)
        return LearnerStats(
            tokens=sum(len(sample.token_ids) for update in work for batch in update for sample in batch)
        )

    def offer_weights(self, generator_ranks: int) -> WeightOffer:
        return WeightOffer({}, {})

    def connect_weights(self, forward: Any) -> None:
        pass

    def publish_weights(self) -> None:
        pass  # a generator's `load_weights` takes the time

    def weight_digests(self) -> dict[str, int]:
        return {}

    def save_checkpoint(self, folder: str) -> int:
        return 0

    def export(self, folder: str) -> None:
        Path(folder, "nothing").touch()


class EmulatedCluster:
    """A `cluster` whose generators and learners sleep, and whose rewards are scored as ever. Started once."""

    def __init__(self, config: Config, seconds: Seconds) -> None:
        from rft_cluster.cluster.cluster import Cluster
        from rft_cluster.cluster.handles import ActorGroup, Learners, RewardActor
        from rft_cluster.cluster.placement import plan_actors
        from rft_cluster.cluster.rollouts import Generators
        from rft_cluster.cluster.weight_sync import WeightSync
        from rft_cluster.rewards.scorer import Scorer

        learners, generators, _ = plan_actors(config)
        light = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        generator_handles = {
            name: ray.remote(EmulatedGenerator).options(max_concurrency=8, **light).remote(seconds)
            for name in generators.names
        }
        learner_handles = {
            name: ray.remote(EmulatedLearner).options(**light).remote(seconds) for name in learners.names
        }
        reward = ray.remote(Scorer).options(**light).remote(config.rewards, config.scoring)
        self._handles = [*generator_handles.values(), *learner_handles.values(), reward]
        ray.get([handle.__ray_ready__.remote() for handle in self._handles], timeout=600)
        members = Learners(learner_handles, 600)
        weights = WeightSync(members, ActorGroup(generator_handles, 600), "shared_memory", tensor_parallel=1)
        weights.connect(dict.fromkeys([*learner_handles, *generator_handles], "here"))
        self.cluster = Cluster(
            Generators(generator_handles, 600, config.generators.max_concurrent),
            RewardActor({"reward": reward}, 600),
            members,
            weights,
            config,
        )

    def close(self) -> None:
        for handle in self._handles:
            ray.kill(handle)


def dataset(count: int, image_bytes: int) -> FewShotDataset:
    """Training images of noise, which take about `image_bytes` each: PNG cannot make them smaller."""
    images = [LabelledImage(f"photos/{i}", _noise(i, image_bytes), ("rose", "tulip")[i % 2]) for i in range(count)]
    return FewShotDataset.of("emulated", ["rose", "tulip"], images, [], [], [])


def _noise(seed: int, image_bytes: int) -> bytes:
    side = math.isqrt(image_bytes // 3)
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side)).save(file, "PNG")
    return file.getvalue()
