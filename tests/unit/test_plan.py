import pytest

from rft_cluster.config import load_config
from rft_cluster.errors import UserError
from rft_cluster.plan import ActorPlan, NodeResources, check_fits, describe, needed, plan_actors

ON_GPUS = ["cluster.device=cuda", "generators.gpus=1", "learners.gpus=1", "learners.cpus=1"]


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
    ],
)
def test_what_all_actors_need_together(overrides, cpus, gpus):
    assert needed(config(*overrides)) == pytest.approx((cpus, gpus))


@pytest.mark.parametrize(
    ("overrides", "nodes"),
    [
        ([], [(2, 0)]),
        ([], [(1, 0), (1, 0)]),
        ([*ON_GPUS, "generators.count=2"], [(4, 4)]),
        ([*ON_GPUS, "generators.count=2"], [(16, 2), (2, 2), (8, 0)]),
        (["learners.cpus=0", "generators.cpus=0"], [(0, 0)]),
    ],
)
def test_a_cluster_that_is_large_enough_passes(overrides, nodes):
    check_fits(config(*overrides), [NodeResources(*node) for node in nodes])


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
            "no node has 3 CPUs and 0 GPUs for one generator; the largest have 2 CPUs and 0 GPUs",
        ),
        (
            [*ON_GPUS, "generators.gpus=4", "learners.count=1"],
            [(8, 3), (8, 2)],
            "no node has 1 CPUs and 4 GPUs for one generator; the largest have 8 CPUs and 3 GPUs",
        ),
        (
            # Enough of each, never on one node.
            [*ON_GPUS, "learners.count=1", "generators.cpus=4"],
            [(8, 0), (1, 2)],
            "no node has 4 CPUs and 1 GPUs for one generator; the largest have 8 CPUs and 2 GPUs",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(overrides, nodes, message):
    with pytest.raises(UserError) as caught:
        check_fits(config(*overrides), [NodeResources(*node) for node in nodes])
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
    assert "placement group (PACK): a bundle for each learner, then for each generator" in text
    # 15 * 8 completions for 2 learners; 40 / 15 steps an epoch
    assert "15 prompts x 8 completions = 120 completions, 60 a learner in forwards of 80" in text
    assert "80 steps; an epoch of 40 images is 2.66667 steps" in text


def test_a_learner_s_share_is_rounded_up():
    # 5 * 3 = 15 completions for 2 learners
    text = describe(config("schedule.prompts_per_step=5", "sampling.group_size=3"), train_images=40)
    assert "= 15 completions, 8 a learner" in text
