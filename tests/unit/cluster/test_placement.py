import pytest

from rft_cluster.cluster.placement import (
    ActorPlan,
    NodeResources,
    bundles,
    describe,
    describe_placement,
    needed,
    place,
    plan_actors,
)
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config

ON_GPUS = ["cluster.device=cuda", "generators.gpus=1", "learners.gpus=1", "learners.cpus=1"]


def cluster_of(*sizes: tuple[float, float]) -> list[NodeResources]:
    """Nodes of (CPUs, GPUs): n0 at 10.0.0.0, n1 at 10.0.0.1, ..."""
    return [NodeResources(f"n{i}", f"10.0.0.{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)]


def config(*overrides: str):
    """digits, whose actors are 1 generator of 1 CPU and 2 learners of 0.5 CPU, changed."""
    return load_config("digits", list(overrides))


@pytest.mark.parametrize(("count", "names"), [(1, ["generator"]), (3, ["generator-0", "generator-1", "generator-2"])])
def test_actors_of_a_role_are_numbered_when_there_are_several(count, names):
    assert ActorPlan("generator", count, 1, 0).names == names


def test_the_plan_names_every_actor_learners_first():
    actors = plan_actors(config("generators.count=2"))
    assert actors == [
        ActorPlan("learner", 2, 0.5, 0),
        ActorPlan("generator", 2, 1, 0),
        ActorPlan("reward", 1, 0, 0),
    ]
    assert [name for role in actors for name in role.names] == [
        *("learner-0", "learner-1", "generator-0", "generator-1", "reward")
    ]


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus"),
    [
        ([], 2, 0),  # 2 * 0.5 + 1 * 1
        (["generators.count=3", "generators.cpus=2"], 7, 0),  # 2 * 0.5 + 3 * 2
        ([*ON_GPUS, "generators.count=2"], 4, 4),  # 2 * 1 + 2 * 1 of both
        ([*ON_GPUS, "generators.gpus=4", "learners.count=8"], 9, 12),  # 8 + 1 CPUs, 8 + 4 GPUs
        ([*ON_GPUS, "generators.gpus=0.4", "learners.gpus=0.6", "learners.count=1"], 2, 1),
        ([*ON_GPUS, "generators.gpus=0.2", "learners.gpus=0.3", "generators.count=2"], 4, 2),  # a whole GPU a pair
    ],
)
def test_what_all_actors_need_together(overrides, cpus, gpus):
    assert needed(config(*overrides)) == pytest.approx((cpus, gpus))


@pytest.mark.parametrize(
    ("overrides", "nodes", "chosen"),
    [
        ([], [(2, 0)], ["n0", "n0", "n0"]),
        ([], [(1, 0), (1, 0)], ["n0", "n0", "n1"]),
        # All learners fit on the second node and not on the first: they are not scattered.
        ([*ON_GPUS, "learners.count=4"], [(8, 2), (8, 4)], ["n1", "n1", "n1", "n1", "n0"]),
        # The smallest node that holds all learners, so that the large one is left for the large generator.
        ([*ON_GPUS, "generators.gpus=8"], [(16, 8), (8, 2)], ["n1", "n1", "n0"]),
        # Learners on the largest node would leave no room for a generator over 4 GPUs: it chooses first.
        ([*ON_GPUS, "learners.count=3", "generators.gpus=4"], [(16, 4), (8, 2), (8, 1)], ["n1", "n1", "n2", "n0"]),
        # No node holds all five: the one that holds most, then the rest. The head has no GPU and gets nothing.
        ([*ON_GPUS, "learners.count=5"], [(64, 0), (8, 2), (8, 4)], ["n2", "n2", "n2", "n2", "n1", "n1"]),
        # 8 GPUs of two nodes, the recipe's split
        ([*ON_GPUS, "learners.count=4", "generators.count=4"], [(16, 4), (16, 4)], ["n0"] * 4 + ["n1"] * 4),
    ],
)
def test_where_learners_and_generators_go(overrides, nodes, chosen):
    assert [node.node_id for node in place(config(*overrides), cluster_of(*nodes))] == chosen


SHARED = [*ON_GPUS, "generators.gpus=0.4", "learners.gpus=0.6", "learners.count=2", "generators.count=2"]


def test_a_shared_gpu_is_one_bundle():
    pairs = bundles(config(*SHARED))
    assert [bundle.actors for bundle in pairs] == [("learner-0", "generator-0"), ("learner-1", "generator-1")]
    assert [(bundle.cpus, bundle.gpus) for bundle in pairs] == [(2, 1), (2, 1)]  # 1 + 1 CPUs, 0.6 + 0.4 GPUs
    assert [node.node_id for node in place(config(*SHARED), cluster_of((8, 1), (8, 1)))] == ["n0", "n1"]


def test_without_training_a_gpu_that_is_shared_has_one_engine():
    """Ray would put two halves onto one GPU, and each engine takes its share of the whole card's memory."""
    assert [(bundle.actors, bundle.gpus) for bundle in bundles(config(*SHARED), training=False)] == [
        (("generator-0",), 1), (("generator-1",), 1)
    ]  # fmt: skip
    with pytest.raises(UserError, match="needs 2 GPUs"):
        place(config(*SHARED), cluster_of((8, 1)), training=False)


def test_the_placement_for_people():
    text = describe_placement(config(*ON_GPUS), cluster_of((8, 1), (8, 2)))
    assert text == "  10.0.0.1: learner-0, learner-1\n  10.0.0.0: generator"


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        (
            [*ON_GPUS, "generators.count=2"],
            [(16, 2)],
            "the run needs 4 GPUs, the cluster has 2 on 1 node(s): lower generators.count, learners.count or their "
            "gpus, or add nodes",
        ),
        (
            ["generators.count=3"],
            [(2, 0), (1.5, 0)],
            "the run needs 4 CPUs, the cluster has 3.5 on 2 node(s): lower generators.count, learners.count or their "
            "cpus, or add nodes",
        ),
        (
            [*ON_GPUS, "generators.count=2"],
            [(1, 2)],  # both are short: GPUs come first
            "the run needs 4 GPUs, the cluster has 2 on 1 node(s): lower generators.count, learners.count or their "
            "gpus, or add nodes",
        ),
        (
            [],
            [],
            "the run needs 2 CPUs, the cluster has 0 on 0 node(s): lower generators.count, learners.count or their "
            "cpus, or add nodes",
        ),
        (
            ["generators.cpus=3"],
            [(2, 0), (2, 0)],
            "no node has 3 CPUs and 0 GPUs for generator: the nodes have 10.0.0.0 2 CPUs and 0 GPUs; 10.0.0.1 2 CPUs "
            "and 0 GPUs",
        ),
        (
            # Enough of each, never on one node.
            [*ON_GPUS, "learners.count=1", "generators.cpus=4"],
            [(8, 0), (1, 2)],
            "no node has 4 CPUs and 1 GPUs for generator: the nodes have 10.0.0.0 8 CPUs and 0 GPUs; 10.0.0.1 1 CPUs "
            "and 2 GPUs",
        ),
        (
            # 6 GPUs for 6, but two generators over 2 GPUs do not fit between the odd ones.
            [*ON_GPUS, "generators.count=2", "generators.gpus=2"],
            [(8, 3), (8, 1), (8, 1), (8, 1)],
            "the cluster has enough in all, but scattered over its 4 nodes it does not hold 4 bundles, the largest "
            "(generator-0) of 1 CPUs and 2 GPUs: the nodes have 10.0.0.0 8 CPUs and 3 GPUs; 10.0.0.1 8 CPUs and "
            "1 GPUs; 10.0.0.2 8 CPUs and 1 GPUs; 10.0.0.3 8 CPUs and 1 GPUs",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(overrides, nodes, message):
    with pytest.raises(UserError) as caught:
        place(config(*overrides), cluster_of(*nodes))
    assert str(caught.value) == message


def test_the_plan_for_people():
    lines = describe(config("generators.count=2", "schedule.prompts_per_step=15"), train_images=40).splitlines()
    words = [line.split() for line in lines]
    assert words[0] == ["actors", "each:", "CPUs", "GPUs"]
    assert words[1:5] == [
        ["2", "learners", "0.5", "0"],
        ["2", "generators", "1", "0"],
        ["1", "reward", "0", "0"],
        ["in", "all", "3", "0"],  # 2 * 0.5 + 2 * 1
    ]
    text = "\n".join(lines)
    assert "placement   on as few nodes as possible, by what is free when the run starts" in text
    # 15 * 8 completions for 2 learners; 40 / 15 steps an epoch
    assert "15 prompts x 8 completions = 120 completions, 60 a learner in micro-batches of 4096 tokens at most" in text
    assert "80 steps; an epoch of 40 images is 2.66667 steps" in text


def test_a_learner_s_share_is_rounded_up():
    # 5 * 3 = 15 completions for 2 learners
    text = describe(config("schedule.prompts_per_step=5", "sampling.group_size=3"), train_images=40)
    assert "= 15 completions, 8 a learner" in text
