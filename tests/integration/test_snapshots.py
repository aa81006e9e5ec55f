"""The learners' state outlives them: real Ray, FSDP2 ranks of a tiny policy, nodes that are lost."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes

from rft_cluster.cluster.handles import Learners
from rft_cluster.cluster.images import StoredImages
from rft_cluster.cluster.snapshots import Snapshots, Writing
from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.config import Config, load_config
from rft_cluster.data import FewShotDataset
from rft_cluster.learner.learner import Learner
from rft_cluster.learner.snapshot import shards_file
from rft_cluster.messages import TrainingSample
from rft_cluster.run.checkpoints import NewCheckpoint, State, latest_checkpoint
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
        learners = Learners(handles, 400)
        learners.join(dict.fromkeys(handles, "127.0.0.1"), 400)
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


@pytest.mark.slow
def test_learners_go_on_from_memory_after_the_loss_of_a_node(
    lose: Lose, tiny_model: str, dataset: FewShotDataset, samples: list[TrainingSample]
):
    ranks, snapshots = Ranks(tiny_model, dataset), Snapshots()
    learners = ranks.start("first", "second")
    assert snapshots.restore(learners) is None, "there is none yet"
    update(learners, samples, 0)
    snapshots.take(learners, 1)
    update(learners, samples, 1)
    wait_until(lambda: snapshots.newest() == 1, 120, "the second copies are stored")
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
    assert len(set(snapshots._nodes(learners))) == 1
    wait_until(lambda: snapshots.newest() == 3, 120, "the snapshot is stored")
    lose("first")
    learners = ranks.start("head", "head")
    assert snapshots.restore(learners) is None
    assert snapshots.newest() is None


def whole_tensors(learners: Learners) -> dict[str, str]:
    """Digests of all weights and moments, whatever the number of ranks: FSDP shards the first dimension."""
    snapshots = [snapshot for snapshot, _ in learners.call_all("snapshot", 0)]
    return {
        name: hashlib.sha256(b"".join(one.shards[name].data.tobytes() for one in snapshots)).hexdigest()
        for name in snapshots[0].shards
    }


def test_a_checkpoint_is_written_while_training_goes_on_and_read_by_any_number_of_ranks(
    lose: Lose, tiny_model: str, dataset: FewShotDataset, samples: list[TrainingSample], tmp_path: Path
):
    ranks, snapshots = Ranks(tiny_model, dataset), Snapshots()
    learners = ranks.start("head", "head")

    def begin(step: int, folder: str = "run") -> NewCheckpoint:
        state = State(step=step, prompt_sha256="")
        return NewCheckpoint(tmp_path / folder, state, lambda path, at: snapshots.write(learners, at, path))

    update(learners, samples, 0)
    expected = whole_tensors(learners)
    first, twin = begin(1), begin(1, "twin")
    update(learners, samples, 1)
    assert whole_tensors(learners) != expected
    assert first.finish() > 0 and twin.finish() > 0
    found, notes = latest_checkpoint(tmp_path / "run")
    assert found is not None and not notes
    assert (found.state.step, found.state.optimizer_updates, len(found.state.digests)) == (1, 1, 2)
    assert found.state.digests == latest_checkpoint(tmp_path / "twin")[0].state.digests

    # A writer that is killed costs its checkpoint alone. It hangs here, because nobody reads from the pipe.
    def hang(path: Path, step: int) -> Writing:
        os.mkfifo(path / shards_file(1))
        return snapshots.write(learners, step, path)

    second = NewCheckpoint(tmp_path / "run", State(step=2, prompt_sha256=""), hang)
    wait_until(writers, 60, "a writer has started")
    for process in writers():
        process.kill()
    with pytest.raises(ClusterError, match=r"learner-1 \(its checkpoint\) died while 'writing'"):
        second.finish()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]

    for nodes in (["head"] * 2, ["head"], ["head"] * 3):
        if len(nodes) != len(learners):
            kill(learners)
            learners = ranks.start(*nodes)
        assert whole_tensors(learners) != expected
        learners.restore_checkpoint(found.path, found.state.optimizer_updates, found.state.step)
        assert whole_tensors(learners) == expected

    file = found.path / shards_file(0)
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match="its bytes have changed since they were written"):
        latest_checkpoint(tmp_path / "run")


def writers() -> list[psutil.Process]:
    """Processes that write the second rank's file: the first one's has nothing to wait for."""
    # Asked of process_iter, so that a process that ends meanwhile is passed over.
    listed = psutil.process_iter(["cmdline"])
    return [process for process in listed if "ray::write_shards" in " ".join(process.info["cmdline"] or [])]
