"""The learners' state outlives them: real Ray, FSDP2 ranks of a tiny policy, nodes that are lost."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes

from rft_cluster.cluster.handles import Learners
from rft_cluster.cluster.images import StoredImages
from rft_cluster.cluster.snapshots import Snapshots
from rft_cluster.config import Config, load_config
from rft_cluster.data import FewShotDataset
from rft_cluster.learner.learner import Learner
from rft_cluster.messages import TrainingSample
from tests.integration.head import wait_until

MICRO_BATCH = 4096


Lose = Callable[[str], None]


@pytest.fixture
def lose() -> Iterator[Lose]:
    """Ray's nodes `head`, where this process is, `first` and `second`; and a way to lose one of them."""
    cluster = RayNodes(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"head": 9}})
    nodes = {name: cluster.add_node(num_cpus=2, resources={name: 9}) for name in ("first", "second")}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    yield lambda name: cluster.remove_node(nodes[name], allow_graceful=False)
    ray.shutdown()
    cluster.shutdown()


class Ranks:
    """Starts learners of one run, again and again."""

    def __init__(self, path: str, dataset: FewShotDataset) -> None:
        self._path, self._images = path, StoredImages(dataset.images)
        self._config: Config = load_config("digits", ["algorithm.kl_beta=0"])

    def start(self, *nodes: str) -> Learners:
        """One learner on each of `nodes`, by rank."""
        handles = {
            f"learner-{rank}": ray.remote(Learner)
            .options(num_cpus=0, resources={node: 1})
            .remote(self._path, self._config, rank, 1, self._images)
            for rank, node in enumerate(nodes)
        }
        learners = Learners(handles, 120)
        learners.join(dict.fromkeys(handles, "127.0.0.1"), 120)
        return learners


def kill(learners: Learners) -> None:
    for handle in learners.handles:
        ray.kill(handle)


def update(learners: Learners, samples: Sequence[TrainingSample], step: int) -> None:
    stats = learners.start_update(samples, step, 1, MICRO_BATCH).wait()
    assert stats is not None and stats.grad_norm > 0


def digest(learners: Learners) -> str:
    """Of all ranks' weights and moments, and of the number of updates."""
    found = hashlib.sha256()
    for snapshot, _ in learners.call_all("snapshot", 0):
        for name, shard in snapshot.shards.items():
            found.update(name.encode() + shard.data.tobytes())
        found.update(str(snapshot.updates).encode())
    return found.hexdigest()


def test_learners_go_on_from_memory_after_the_loss_of_a_node(
    lose: Lose, tiny_model: str, dataset: FewShotDataset, samples: list[TrainingSample]
):
    ranks, snapshots = Ranks(tiny_model, dataset), Snapshots()
    learners = ranks.start("first", "second")
    assert snapshots.restore(learners) is None, "there is none yet"
    update(learners, samples, 0)
    snapshots.take(learners, 1)
    update(learners, samples, 1)
    wait_until(lambda: snapshots.newest() == 1, 30, "the second copies are stored")
    expected = digest(learners)
    snapshots.take(learners, 2)
    kill(learners)
    lose("second")

    # The state of rank 1 is gone with its node. Its second copy is on the other's.
    learners = ranks.start("first", "first")
    before = digest(learners)
    step = snapshots.restore(learners)
    assert step in (1, 2), "the second may have been stored before the learners were killed"
    assert digest(learners) != before
    if step == 1:
        update(learners, samples, 1)
    assert digest(learners) == expected

    # On one node there is no second copy.
    snapshots.take(learners, 3)
    assert len(set(snapshots.nodes(learners))) == 1
    wait_until(lambda: snapshots.newest() == 3, 30, "the snapshot is stored")
    lose("first")
    learners = ranks.start("head", "head")
    assert snapshots.restore(learners) is None
    assert snapshots.newest() is None
