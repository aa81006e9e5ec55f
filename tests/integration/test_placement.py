"""Where Ray puts bundles and actors on unequal nodes: a head without GPUs, a node of four and a node of two.

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
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from rft_cluster.cluster import start as module
from rft_cluster.cluster.placement import bundles, place
from rft_cluster.cluster.start import cluster_nodes, connect, start_cluster
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
        def offer_rendezvous(self, one_host: bool) -> str:
            return "somewhere"

        def join(self, rendezvous: str, one_host: bool) -> None:
            pass

        def connect_generators(self, client: object) -> None:
            pass

    for name, role in (("Generator", Generator), ("Scorer", Role), ("Learner", Learner)):
        monkeypatch.setattr(module, name, role)
    monkeypatch.setattr(module, "GeneratorsClient", lambda *arguments: None)


@pytest.mark.parametrize(
    ("overrides", "learners", "generators"),
    [
        # Only the node of four holds three learners; the generator over two GPUs gets the other one.
        (["learners.count=3", "generators.gpus=2"], ["four"] * 3, ["two"]),
        # The smaller node holds both learners, and is taken: two generators of two GPUs each share the larger.
        (["learners.count=2", "generators.gpus=2", "generators.count=2"], ["two"] * 2, ["four"] * 2),
        # Learners together would leave no three GPUs on a node: the generator chooses first, and two nodes hold them.
        (["learners.count=3", "generators.gpus=3"], ["two", "two", "four"], ["four"]),
    ],
    ids=["three-learners", "two-generators", "large-generator"],
)
def test_actors_are_where_the_plan_says(nodes: Nodes, recorders: None, overrides, learners, generators):
    config = nodes.config(*overrides)
    with start_cluster(config, "model", {}) as started:
        learner_places = started.learners.call_all("where")
        generator_places = started.generators.call_all("where")
        (reserved,) = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert [nodes.names[node] for node, _, _ in learner_places] == learners
    assert [nodes.names[node] for node, _, _ in generator_places] == generators
    assert reserved["name"] == "rft-digits"
    places = [reserved["bundles_to_node_id"][index] for index in range(len(learners) + len(generators))]
    assert [nodes.names[node] for node in places] == learners + generators
    # Each has as many GPUs as it asked for, sees no others, and shares none.
    assert [len(gpus) for _, gpus, _ in learner_places] == [1] * len(learners)
    assert [len(gpus) for _, gpus, _ in generator_places] == [config.generators.gpus] * len(generators)
    for _, gpus, visible in learner_places + generator_places:
        assert visible == ",".join(str(gpu) for gpu in gpus)
    held = [(node, gpu) for node, gpus, _ in learner_places + generator_places for gpu in gpus]
    assert len(held) == len(set(held))


def test_a_shared_gpu_holds_its_generator_beside_its_learner(nodes: Nodes, recorders: None):
    shared = ["learners.count=2", "learners.gpus=0.5", "generators.count=2", "generators.gpus=0.5"]
    with start_cluster(nodes.config(*shared), "model", {}) as started:
        learner_places = started.learners.call_all("where")
        generator_places = started.generators.call_all("where")
    assert learner_places == generator_places
    assert [nodes.names[node] for node, _, _ in learner_places] == ["two"] * 2
    assert sorted(gpus for _, gpus, _ in learner_places) == [[0], [1]]


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
    monkeypatch.setattr(module, "RESERVE_TIMEOUT", 3.0)
    config = connected.config("learners.count=3", "generators.gpus=2")
    wanted, nodes = bundles(config), place(config, cluster_nodes())
    (four,) = [node for node, name in connected.names.items() if name == "four"]
    other = placement_group([{"GPU": 2}], bundle_label_selector=[{"ray.io/node-id": four}])
    ray.get(other.ready(), timeout=30)

    start = time.monotonic()
    message = "its resources are taken: 32 CPUs and 4 GPUs are free, 4 and 5 are needed"
    with pytest.raises(UserError, match=message):
        module._reserve(config, wanted, nodes)
    assert time.monotonic() - start < 8

    remove_placement_group(other)
    monkeypatch.setattr(module, "RESERVE_TIMEOUT", 30.0)
    reserved = module._reserve(config, wanted, nodes)
    table = placement_group_table(reserved)
    assert [connected.names[table["bundles_to_node_id"][index]] for index in range(4)] == ["four"] * 3 + ["two"]
    remove_placement_group(reserved)
