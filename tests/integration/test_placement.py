"""Ray's placement of bundles and actors on unequal nodes: a head without GPUs, a node with four, a node with two.

The nodes are Ray's own on this machine and only claim their GPUs, so recorders stand in for the roles; placement,
reservation and actors' options are the real ones. All nodes have one address here: a node is known by its id.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import ray
from ray._raylet import AuthenticationTokenLoader
from ray._raylet import Config as RayConfig
from ray.cluster_utils import Cluster as RayNodes
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from rft_cluster.cluster import actors, reservation
from rft_cluster.cluster import start as module
from rft_cluster.cluster.nodes import check_gpus
from rft_cluster.cluster.placement import bundles, place
from rft_cluster.cluster.reservation import reserve
from rft_cluster.cluster.start import check_cluster, cluster_nodes, connect, start_cluster
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config

ON_GPUS = ["cluster.device=cuda", "learners.gpus=1", "learners.cpus=1", "generators.cpus=1", "generators.count=1"]
SMALL = {"object_store_memory": 10**8, "include_dashboard": False}
SIZES = {"head": (16, 0), "four": (8, 4), "two": (8, 2)}  # CPUs and GPUs


@dataclass(frozen=True)
class Nodes:
    address: str
    names: dict[str, str]  # of the nodes, by Ray's ids

    def config(self, *overrides: str) -> Config:
        return load_config("digits", [*ON_GPUS, f"cluster.address={self.address}", *overrides])


def follow_environment() -> None:
    """Ray reads its settings once; here they change between two clusters of one process."""
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[Nodes]:
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        follow_environment()
        started = RayNodes()
        try:
            ids = {
                started.add_node(wait=False, num_cpus=cpus, num_gpus=gpus, **SMALL).node_id: name
                for name, (cpus, gpus) in SIZES.items()
            }
            started.wait_for_nodes(timeout=60)
            yield Nodes(started.address, ids)
        finally:
            started.shutdown()
    follow_environment()


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles that can say where they are. Defined here, they travel to the workers by value."""

    class Role:
        def __init__(self, *arguments: object) -> None:
            pass

        def where(self) -> tuple[str, list[int], str | None]:
            return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")

    class Generator(Role):
        def sleep(self) -> None:
            pass

    class Learner(Role):
        def offer_rendezvous(self, addresses: list[str]) -> str:
            return "somewhere"

        def join(self, rendezvous: str, *addresses: list[str]) -> None:
            pass

    class Weights:
        def __init__(self, *arguments: object) -> None:
            pass

        def connect(self, addresses: dict[str, str]) -> None:
            pass

        def verify(self) -> dict[ray.ObjectRef, str]:
            return {}

    for name, role in (("Generator", Generator), ("Scorer", Role), ("Learner", Learner)):
        monkeypatch.setattr(actors, name, role)
    monkeypatch.setattr(module, "WeightSync", Weights)
    monkeypatch.setattr(module, "check_gpus", lambda nodes: None)  # they only claim their GPUs
    monkeypatch.setattr(module, "fetch_model", lambda *_: None)


@pytest.mark.parametrize(
    ("overrides", "learners", "generators"),
    [
        # All learners are on one node, and the generator over two GPUs is on the other: alone it would take the larger.
        (["learners.count=3", "generators.gpus=2"], ["four"] * 3, ["two"]),
        (["learners.count=2", "generators.gpus=2", "generators.count=2"], ["four"] * 2, ["four", "two"]),
        # Learners on the larger node would leave no three GPUs on one: Ray places all at once, the generator first.
        (["learners.count=3", "generators.gpus=3"], ["four", "two", "two"], ["four"]),
    ],
    ids=["three-learners", "two-generators", "large-generator"],
)
def test_actors_are_packed_on_few_nodes(nodes: Nodes, recorders: None, overrides, learners, generators):
    config = nodes.config(*overrides)
    with start_cluster(config, "model", {}) as started:
        learner_places = started.learners.call_all("where")
        generator_places = started.generators.call_all("where")
        reserved = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert sorted(nodes.names[node] for node, _, _ in learner_places) == learners
    assert sorted(nodes.names[node] for node, _, _ in generator_places) == generators
    assert {group["strategy"] for group in reserved} == {"PACK"}
    assert sorted(len(group["bundles"]) for group in reserved) == [*[1] * len(generators), len(learners)]
    places = [node for group in reserved for node in group["bundles_to_node_id"].values()]
    assert sorted(places) == sorted(node for node, _, _ in learner_places + generator_places)
    # Each has as many GPUs as it asked for, sees no others, and shares none.
    assert [len(gpus) for _, gpus, _ in learner_places] == [1] * len(learners)
    assert [len(gpus) for _, gpus, _ in generator_places] == [config.generators.gpus] * len(generators)
    for _, gpus, visible in learner_places + generator_places:
        assert visible == ",".join(str(gpu) for gpu in gpus)
    held = [(node, gpu) for node, gpus, _ in learner_places + generator_places for gpu in gpus]
    assert len(held) == len(set(held))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_shared_gpu_holds_its_generator_beside_its_learner(nodes: Nodes, recorders: None, share: float):
    """And no second pair, even if both would fit by what they ask for."""
    shared = ["learners.count=2", f"learners.gpus={share}", "generators.count=2", f"generators.gpus={share}"]
    with start_cluster(nodes.config(*shared), "model", {}) as started:
        learner_places = started.learners.call_all("where")
        generator_places = started.generators.call_all("where")
    assert learner_places == generator_places
    assert len({node for node, _, _ in learner_places}) == 1
    assert sorted(gpus for _, gpus, _ in learner_places) == [[0], [1]]


def test_a_node_without_a_driver_is_named_before_actors_start(nodes: Nodes, recorders: None, monkeypatch):
    monkeypatch.setattr(module, "check_gpus", check_gpus)
    monkeypatch.setattr(module, "start_actors", lambda *_: pytest.fail("actors start"))
    config = nodes.config("learners.count=1", "generators.gpus=1")
    for check in (lambda: start_cluster(config, "model", {}).__enter__(), lambda: check_cluster(config)):
        with pytest.raises(UserError, match=r"^[0-9.]+ has no NVIDIA driver: install one of branch 580"):
            check()


def held_by_another_job(nodes: Nodes, name: str, gpus: int) -> PlacementGroup:
    (node,) = [node for node, called in nodes.names.items() if called == name]
    group = placement_group([{"GPU": gpus}], bundle_label_selector=[{"ray.io/node-id": node}])
    ray.get(group.ready(), timeout=30)
    return group


def nodes_of(nodes: Nodes, groups: list[PlacementGroup]) -> list[str]:
    tables = [placement_group_table(group)["bundles_to_node_id"] for group in groups]
    return [nodes.names[places[index]] for places in tables for index in range(len(places))]


def until_all_is_free() -> None:
    """Ray gives resources back a moment later."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("GPU", 0) < sum(gpus for _, gpus in SIZES.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def nothing_is_held(nodes: Nodes) -> None:
    """By the test before."""
    connect(nodes.config("learners.count=1", "generators.gpus=1").cluster, cpus=0)
    until_all_is_free()
    ray.shutdown()


@pytest.fixture
def connected(nodes: Nodes) -> Iterator[Nodes]:
    connect(nodes.config("learners.count=1", "generators.gpus=1").cluster, cpus=0)
    yield nodes
    ray.shutdown()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learners.count=5", "generators.gpus=2"], "the run needs 7 GPUs, the cluster has 6 on 3 node"),
        (["learners.count=1", "generators.gpus=5"], "no node has 1 CPUs and 5 GPUs for generator"),
        (
            ["learners.count=2", "generators.gpus=1", "generators.cpus=12"],
            "no node has 12 CPUs and 1 GPUs for generator",
        ),
    ],
)
def test_what_no_node_has_is_refused(connected: Nodes, overrides, message):
    with pytest.raises(UserError, match=message):
        place(connected.config(*overrides), cluster_nodes())


def test_what_others_hold_is_refused_within_seconds_and_can_be_had_later(connected: Nodes, monkeypatch):
    monkeypatch.setattr(reservation, "RESERVE_TIMEOUT", 3.0)
    monkeypatch.setattr(reservation, "ATTEMPT", 1.0)
    config = connected.config("learners.count=3", "generators.gpus=2")
    wanted, other = bundles(config), held_by_another_job(connected, "four", gpus=2)

    start = time.monotonic()
    message = "its resources are taken: 32 CPUs and 4 GPUs are free, 4 and 5 are needed"
    with pytest.raises(UserError, match=message):
        reserve(config, wanted)
    assert time.monotonic() - start < 8

    remove_placement_group(other)
    until_all_is_free()
    monkeypatch.setattr(reservation, "RESERVE_TIMEOUT", 30.0)
    monkeypatch.setattr(reservation, "ATTEMPT", 15.0)  # the second attempt would let the generator choose first
    reserved = reserve(config, wanted)
    assert nodes_of(connected, reserved.groups) == ["four"] * 3 + ["two"]
    reserved.give_back()


@pytest.mark.parametrize(("held", "free"), [("two", "four"), ("four", "two")])
def test_a_node_that_another_job_holds_is_left_for_one_that_is_free(connected: Nodes, monkeypatch, held, free):
    """Both are large enough for the run, and nothing binds it to the one that it would have on an empty cluster."""
    monkeypatch.setattr(reservation, "RESERVE_TIMEOUT", 10.0)
    config = connected.config("learners.count=1", "generators.gpus=1")
    other = held_by_another_job(connected, held, gpus=SIZES[held][1])
    reserved = reserve(config, bundles(config))
    assert nodes_of(connected, reserved.groups) == [free] * 2
    reserved.give_back()
    remove_placement_group(other)
