"""A generator and a learner on one GPU: who sleeps, who works, in which order. Sleep does nothing on the CPU build of
vLLM, so recorders stand in for actors and engine."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from some_prompt import some_prompt

from rft_cluster.cluster import actors, generator_actor, handles, reservation, start
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.handles import Learners, RewardActor
from rft_cluster.cluster.placement import bundles
from rft_cluster.cluster.recovery import never
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config, load_config
from rft_cluster.generator.engine_stats import EngineStats
from rft_cluster.messages import LearnerStats, TrainingSample

GPUS = ["cluster.device=cuda", "learners.count=1"]
SHARED = [*GPUS, "generators.gpus=0.4", "learners.gpus=0.6"]
APART = [*GPUS, "generators.gpus=1", "learners.gpus=1"]


class Actors:
    """Stands in for Ray: `events` lists the starts of actors and the calls that were waited for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.gpus: dict[str, float] = {}
        self.bundles: dict[str, tuple[str, int]] = {}
        self.given: dict[str, tuple[Any, ...]] = {}  # to the actors' constructors
        self.joins: list[tuple[str, tuple[Any, ...]]] = []
        monkeypatch.setattr(handles, "wait_for", self._wait_for)
        monkeypatch.setattr(actors, "wait_for", self._wait_for)
        monkeypatch.setattr(actors, "ray", SimpleNamespace(remote=self._remote, wait=lambda calls, **_: (calls, [])))
        monkeypatch.setattr(actors, "PlacementGroupSchedulingStrategy", lambda group, index: (group.name, index))
        groups = lambda needs, name, **_: SimpleNamespace(name=name, wait=lambda _: True)  # noqa: E731
        monkeypatch.setattr(reservation, "placement_group", groups)
        monkeypatch.setattr(reservation, "taken", lambda wanted: "")
        monkeypatch.setattr(reservation, "placement_group_table", lambda group: {"state": "CREATED"})
        monkeypatch.setattr(start, "WeightSync", lambda *settings: Sync(self.events, *settings))

    def actor(self, name: str) -> Any:
        return Actor(name)

    def _remote(self, *role: type, **settings: Any) -> Any:
        if not role:
            return self._remote

        def options(
            name: str, num_gpus: float, scheduling_strategy: tuple[str, int] | None = None, **others: Any
        ) -> Any:
            def start(*arguments: Any) -> Actor:
                self.events.append(f"start {name}")
                self.given[name] = arguments
                self.gpus[name] = num_gpus
                if scheduling_strategy is not None:
                    self.bundles[name] = scheduling_strategy
                return Actor(name)

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def _wait_for(self, calls: dict["Call", str], timeout: float, doing: str, meanwhile: Any = None) -> list[Any]:
        self.events += [f"{name} {call.method}{call.shown}" for call, name in calls.items()]
        self.joins += [(name, call.arguments) for call, name in calls.items() if call.method == "join"]
        if doing == "starting":
            return ["10.0.0.1"] * len(calls)
        if doing == "offering a rendezvous":
            return ["somewhere"]
        return [LearnerStats() for _ in calls]


class Sync:
    """Stands in for `WeightSync`."""

    def __init__(self, events: list[str], *settings: Any) -> None:
        self._events, self.settings = events, settings

    def connect(self, addresses: dict[str, str]) -> None:
        self._events.append(f"connect {sorted(addresses)}")

    def publish(self, version: int) -> None:
        self._events.append(f"publish {version}")

    def verify(self) -> dict[Any, str]:
        self._events.append("verify")
        return {}

    def wait(self) -> None:
        self._events.append("wait for the verification")


class Call:
    def __init__(self, method: str, arguments: tuple[Any, ...]) -> None:
        self.method, self.arguments = method, arguments
        self.shown = f" {arguments[0]}" if method == "wake_up" else ""


class Actor:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, method: str) -> Any:
        call = SimpleNamespace(remote=lambda *arguments: Call(method, arguments))
        call.options = lambda **_: call
        return call


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Actors:
    return Actors(monkeypatch)


def cluster_of(recorded: Actors, overrides: list[str]) -> Cluster:
    return Cluster(
        Generators({"generator": recorded.actor("generator")}, 1, max_concurrent=8),
        RewardActor({"reward": recorded.actor("reward")}, 1),
        Learners({"learner": recorded.actor("learner")}, 1),
        Sync(recorded.events),  # type: ignore[arg-type]
        load_config("digits", overrides),
    )


def sample() -> TrainingSample:
    prompt = some_prompt()
    return TrainingSample(prompt, [1], [2], [-1.0], advantage=1.0, weight=1.0, index=0)


@pytest.mark.parametrize(
    ("overrides", "events"),
    [
        (SHARED, ["verify", "wait for the verification", "generator sleep", "learner update"]),
        (APART, ["verify", "learner update"]),
        ([], ["verify", "learner update"]),
    ],
)
def test_weights_are_verified_before_learners_update_and_then_generators_sleep(
    recorded: Actors, overrides: list[str], events: list[str]
):
    """A sleeping engine has no weights to verify, and learners at work give no digests. A rollout that was read from
    the journal has not asked for the verification."""
    cluster_of(recorded, overrides).start_update([sample()], step=0).wait()
    assert recorded.events == events


def test_a_step_without_samples_asks_no_learner(recorded: Actors):
    assert cluster_of(recorded, []).start_update([], step=4).wait() is None
    assert recorded.events == ["verify"]


@pytest.mark.parametrize(
    ("overrides", "events"),
    [
        (
            SHARED,
            [
                "learner free_memory",
                "generator wake_up ['weights']",
                "publish 3",
                "learner free_memory",
                "generator wake_up ['kv_cache']",
            ],
        ),
        (APART, ["publish 3"]),
        ([], ["publish 3"]),
    ],
)
def test_memory_comes_back_in_two_parts_around_the_weights(recorded: Actors, overrides: list[str], events: list[str]):
    cluster_of(recorded, overrides).broadcast_weights(version=3)
    assert recorded.events == events


def started(recorded: Actors, overrides: list[str]) -> list[str]:
    """The events when the actors of a configuration start on one large node."""
    config: Config = load_config("digits", overrides)
    reserved = reservation.reserve(config, bundles(config))
    start.start_actors(actors.Actors(config, reserved, "model", {}), never)  # type: ignore[arg-type]
    return recorded.events


def test_a_shared_gpu_s_learner_starts_when_its_generator_sleeps(recorded: Actors):
    assert started(recorded, SHARED) == [
        "start generator",
        "generator __ray_call__",
        "generator sleep",
        "start learner",
        "start reward",
        "learner __ray_call__",
        "generator __ray_call__",
        "reward __ray_call__",
        "learner offer_rendezvous",
        "learner join",
        "connect ['generator', 'learner', 'reward']",
    ]
    assert recorded.gpus == {"generator": 0.4, "learner": 0.6, "reward": 0}
    assert recorded.bundles == {"generator": ("rft-digits", 0), "learner": ("rft-digits", 0)}


def test_actors_with_gpus_of_their_own_start_together_and_never_sleep(recorded: Actors):
    assert started(recorded, APART) == [
        "start generator",
        "start learner",
        "start reward",
        "learner __ray_call__",
        "generator __ray_call__",
        "reward __ray_call__",
        "learner offer_rendezvous",
        "learner join",
        "connect ['generator', 'learner', 'reward']",
    ]
    assert recorded.gpus == {"generator": 1, "learner": 1, "reward": 0}
    assert recorded.bundles == {"generator": ("rft-digits-generator", 0), "learner": ("rft-digits-learners", 0)}


@pytest.mark.parametrize(
    ("overrides", "variable"),
    [(APART, "=eth7"), ([*APART, "cluster.interface=ib0"], "=ib0"), (SHARED, None), (["cluster.interface=ib0"], None)],
)
def test_generators_meet_learner_0_on_the_interface_of_their_host_s_address(
    recorded: Actors, monkeypatch: pytest.MonkeyPatch, overrides: list[str], variable: str | None
):
    """NCCL reads the variable when the engine's workers start or later, so it is there before the engine."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    seen: list[str | None] = []
    monkeypatch.setattr(
        generator_actor.generator.Generator, "__init__", lambda *_: seen.append(os.environ.get("NCCL_SOCKET_IFNAME"))
    )
    monkeypatch.setattr(generator_actor.Generator, "stats", EngineStats(), raising=False)
    monkeypatch.setattr(generator_actor.Exporter, "start", lambda _: None)
    monkeypatch.setattr(
        generator_actor, "ray", SimpleNamespace(util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1"))
    )
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth1": [], "eth7": [SimpleNamespace(address="10.0.0.1")]})
    started(recorded, overrides)
    generator_actor.Generator(*recorded.given["generator"])
    assert seen == [variable]


def test_an_actor_without_gpus_sees_none():
    """The variable means what Ray's worker makes of it: with "0", Ray's default, it would see all GPUs of its node."""
    from ray._private import utils

    variables = actors.environment(load_config("digits", []), 1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}.items():
            patch.setenv(name, value)
        context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": []})
        patch.setattr(ray, "get_runtime_context", lambda: context)
        utils.set_visible_accelerator_ids()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


RESERVED = SimpleNamespace(is_placed=lambda name: True)


def test_an_actor_that_fails_ends_the_start_while_others_still_load(monkeypatch: pytest.MonkeyPatch):
    def wait(calls: list[Call], **_: float) -> tuple[list[Call], list[Call]]:
        assert len(calls) == 2, "the start goes on after an actor failed"
        return calls[1:], calls[:1]

    def wait_for(calls: dict[Call, str], timeout: float, doing: str) -> list[Any]:
        assert list(calls.values()) == ["generator"]
        raise UserError("a generator is out of memory")

    monkeypatch.setattr(actors, "ray", SimpleNamespace(wait=wait))
    monkeypatch.setattr(actors, "wait_for", wait_for)
    starting = actors.Actors(load_config("digits", []), RESERVED, "model", {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a generator is out of memory"):
        starting.wait_until_ready({"learner": Actor("learner"), "generator": Actor("generator")})


def test_actors_that_are_not_ready_in_time_are_named_with_the_key_to_raise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(actors, "ray", SimpleNamespace(wait=lambda calls, **_: time.sleep(0.02) or ([], calls)))
    config = load_config("digits", [])
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"start_timeout": 0.01})})
    starting = actors.Actors(config, RESERVED, "model", {})  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match=r"^learner-1: not ready within cluster\.start_timeout \(0\.01 s\)"):
        starting.wait_until_ready({"learner-1": Actor("learner-1")})


def test_actors_without_room_are_not_told_to_take_longer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(actors, "ray", SimpleNamespace(wait=lambda calls, **_: time.sleep(0.02) or ([], calls)))
    config = load_config("digits", [])
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"start_timeout": 0.01})})
    reserved = SimpleNamespace(is_placed=lambda name: name != "learner-1")
    starting = actors.Actors(config, reserved, "model", {})  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match=r"^learner-1: no node had room within cluster\.start_timeout \(0\.01 s\)$"):
        starting.wait_until_ready({"learner-0": Actor("learner-0"), "learner-1": Actor("learner-1")})


@pytest.mark.parametrize(
    ("overrides", "shares", "transfer"), [(SHARED, True, "ipc"), (APART, False, "nccl"), ([], False, "shared_memory")]
)
def test_weights_of_a_shared_gpu_go_by_cuda_ipc(overrides: list[str], shares: bool, transfer: str):
    config = load_config("digits", overrides)
    assert config.shares_gpus is shares
    assert hardware(config.cluster.device, shares_gpus=config.shares_gpus).transfer == transfer


def test_a_constructor_gets_what_is_valid_wherever_ray_starts_the_actor_again(recorded: Actors):
    """Ray restarts an actor with its first arguments, perhaps elsewhere: addresses go into `join` and `connect`."""
    started(recorded, APART)
    assert recorded.given.keys() == {"generator", "learner", "reward"}
    assert "10.0.0.1" not in repr(recorded.given)
    assert recorded.joins == [("learner", ("somewhere", ["10.0.0.1"], ["10.0.0.1"] * 2))]


def test_a_model_is_exported_when_generators_are_proved_to_hold_what_was_sent(recorded: Actors, tmp_path: Path):
    """The run may end with it: nothing else would ask for the last verification."""
    cluster = cluster_of(recorded, [])
    cluster.export(tmp_path / "model", {})
    assert recorded.events == ["wait for the verification", "learner export"]
