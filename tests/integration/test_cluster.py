"""Actors as Ray sees them: names, order over several generators, and refusals that name what is missing."""

from collections.abc import Iterator

import pytest
import ray
from ray.util.state import list_actors

from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.start import connect, start_cluster
from rft_cluster.common.errors import ClusterError, StaleGenerator, UserError
from rft_cluster.config import Config, load_config
from rft_cluster.data import FewShotDataset
from rft_cluster.messages import Prompt, Sampling

# These start no actors of their own and come before the fixture that does: one process joins one Ray at a time.


def test_what_is_missing_is_named_within_seconds(tiny_model: str):
    greedy = load_config("digits", ["cluster.device=cuda", "generators.gpus=2", "learners.gpus=1"])
    with pytest.raises(UserError, match="needs 4 GPUs, the cluster has 0"), start_cluster(greedy, tiny_model, {}):
        pass


def test_an_address_that_does_not_answer(config: Config):
    section = load_config("digits", ["cluster.address=127.0.0.1:1"]).cluster
    with pytest.raises(UserError, match="no Ray cluster answers at '127.0.0.1:1'".replace(".", r"\.")):
        connect(section, 1)


@pytest.fixture(scope="module")
def two_generators() -> Config:
    return load_config("digits", ["generators.count=2", "generators.cpus=0.5", "learners.count=1", "learners.cpus=0.5"])


@pytest.fixture(scope="module")
def cluster(two_generators: Config, tiny_model: str, dataset: FewShotDataset) -> Iterator[Cluster]:
    with start_cluster(two_generators, tiny_model, dataset.images) as cluster:
        yield cluster


def test_actors_bear_their_roles_in_the_dashboard(cluster: Cluster):
    alive = {
        actor.name for actor in list_actors(address=ray.get_runtime_context().gcs_address) if actor.state == "ALIVE"
    }
    assert alive == {"learner", "generator-0", "generator-1", "reward"}


def test_several_generators_serve_one_version_in_order(cluster: Cluster, prompts: list[Prompt]):
    sampling = Sampling(8, 1.0, 16)
    with pytest.raises(StaleGenerator):
        cluster.generators.generate(prompts, sampling, version=0)
    cluster.broadcast_weights(version=0)
    cluster.weights.wait()
    assert cluster.weights.held == {"generator-0": 0, "generator-1": 0}
    groups, rewards = cluster.generators.start(prompts[:5], sampling, 0, cluster.reward).wait()
    assert [group.prompt.prompt_id for group in groups] == [prompt.prompt_id for prompt in prompts[:5]]
    assert [len(group) for group in rewards] == [8] * 5
    assert {name for group in rewards for reward in group for name in reward.parts} == {"format", "accuracy"}


def test_a_dead_actor_is_named(cluster: Cluster, prompts: list[Prompt]):
    ray.kill(cluster.generators.handles[1])
    with pytest.raises(ClusterError, match="an actor died while 'generate'"):
        cluster.generators.generate(prompts, Sampling(8, 1.0, 16), version=0)
