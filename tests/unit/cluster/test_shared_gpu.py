"""A generator and a learner on one GPU: who sleeps, who works, in which order. Sleep does nothing on the CPU build of
vLLM, so recorders stand in for actors and engine."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from some_prompt import some_prompt

from rft_cluster.cluster import handles, start
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.handles import Learners, RewardActor
from rft_cluster.cluster.placement import NodeResources, bundles
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config, load_config
from rft_cluster.messages import LearnerStats, TrainingSample

GPUS = ["cluster.device=cuda", "learners.count=1"]
SHARED = [*GPUS, "generators.gpus=0.4", "learners.gpus=0.6"]
APART = [*GPUS, "generators.gpus=1", "learners.gpus=1"]


class Actors:
    """Stands in for Ray: `events` lists the starts of actors and the calls that were waited for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.gpus: dict[str, float] = {}
        self.bundles: dict[str, int] = {}
        monkeypatch.setattr(handles, "wait_for", self._wait_for)
        monkeypatch.setattr(start, "wait_for", self._wait_for)
        monkeypatch.setattr(start, "ray", SimpleNamespace(remote=self._remote, wait=lambda calls, **_: (calls, [])))
        monkeypatch.setattr(start, "PlacementGroupSchedulingStrategy", lambda group, index: index)

    def actor(self, name: str) -> Any:
        return Actor(name)

    def _remote(self, *role: type, **settings: Any) -> Any:
        if not role:
            return self._remote

        def options(name: str, num_gpus: float, scheduling_strategy: int | None = None, **others: Any) -> Any:
            def start(*arguments: Any) -> Actor:
                self.events.append(f"start {name}")
                self.gpus[name] = num_gpus
                if scheduling_strategy is not None:
                    self.bundles[name] = scheduling_strategy
                return Actor(name)

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def _wait_for(self, calls: dict["Call", str], timeout: float, doing: str) -> list[Any]:
        self.events += [f"{name} {call.method}{call.shown}" for call, name in calls.items()]
        return [LearnerStats() for _ in calls]


class Call:
    def __init__(self, method: str, arguments: tuple[Any, ...]) -> None:
        self.method = method
        self.shown = f" {arguments[0]}" if method in ("wake_up", "send_weights") else ""


class Actor:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Call(method, arguments))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Actors:
    return Actors(monkeypatch)


def cluster_of(recorded: Actors, overrides: list[str]) -> Cluster:
    return Cluster(
        Generators({"generator": recorded.actor("generator")}, 1, max_concurrent=8),
        RewardActor({"reward": recorded.actor("reward")}, 1),
        Learners({"learner": recorded.actor("learner")}, 1),
        load_config("digits", overrides),
    )


def sample() -> TrainingSample:
    prompt = some_prompt()
    return TrainingSample(prompt, [1], [2], [-1.0], advantage=1.0, weight=1.0)


@pytest.mark.parametrize(
    ("overrides", "events"),
    [(SHARED, ["generator sleep", "learner update"]), (APART, ["learner update"]), ([], ["learner update"])],
)
def test_generators_sleep_before_learners_update(recorded: Actors, overrides: list[str], events: list[str]):
    cluster_of(recorded, overrides).update([sample()], step=0)
    assert recorded.events == events


def test_a_step_without_samples_asks_no_learner(recorded: Actors):
    assert cluster_of(recorded, []).update([], step=4) is None
    assert recorded.events == []


@pytest.mark.parametrize(
    ("overrides", "events"),
    [
        (
            SHARED,
            [
                "generator wake_up ['weights']",
                "learner send_weights 3",
                "learner free_memory",
                "generator wake_up ['kv_cache']",
            ],
        ),
        (APART, ["learner send_weights 3"]),
        ([], ["learner send_weights 3"]),
    ],
)
def test_memory_comes_back_in_two_parts_around_the_weights(recorded: Actors, overrides: list[str], events: list[str]):
    cluster_of(recorded, overrides).broadcast_weights(version=3)
    assert recorded.events == events


def started(recorded: Actors, overrides: list[str]) -> list[str]:
    """What happens when the actors of a configuration start on one large node."""
    config: Config = load_config("digits", overrides)
    wanted = bundles(config)
    nodes = [NodeResources("n0", "10.0.0.1", 64, 8)] * len(wanted)
    reservation = start._Reservation(config, None, wanted, nodes, time.monotonic() + 60)  # type: ignore[arg-type]
    start._start_actors(reservation, "model", {})  # type: ignore[arg-type]
    return recorded.events


def test_a_shared_gpu_s_learner_starts_when_its_generator_sleeps(recorded: Actors):
    assert started(recorded, SHARED) == [
        "start generator",
        "generator __ray_ready__",
        "generator sleep",
        "start learner",
        "start reward",
        "learner __ray_ready__",
        "generator __ray_ready__",
        "reward __ray_ready__",
        "learner offer_rendezvous",
        "learner join",
        "learner connect_generators",
    ]
    assert recorded.gpus == {"generator": 0.4, "learner": 0.6, "reward": 0}
    assert recorded.bundles == {"generator": 0, "learner": 0}


def test_actors_with_gpus_of_their_own_start_together_and_never_sleep(recorded: Actors):
    assert started(recorded, APART) == [
        "start generator",
        "start learner",
        "start reward",
        "learner __ray_ready__",
        "generator __ray_ready__",
        "reward __ray_ready__",
        "learner offer_rendezvous",
        "learner join",
        "learner connect_generators",
    ]
    assert recorded.gpus == {"generator": 1, "learner": 1, "reward": 0}
    assert recorded.bundles == {"generator": 1, "learner": 0}


@pytest.mark.parametrize(
    ("overrides", "shares", "transfer"), [(SHARED, True, "ipc"), (APART, False, "nccl"), ([], False, "shared_memory")]
)
def test_weights_of_a_shared_gpu_go_by_cuda_ipc(overrides: list[str], shares: bool, transfer: str):
    config = load_config("digits", overrides)
    assert config.shares_gpus is shares
    assert hardware(config.cluster.device, shares_gpus=config.shares_gpus).transfer == transfer
