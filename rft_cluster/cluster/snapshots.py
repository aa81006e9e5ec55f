"""The learners' state in memory, outside their processes: learners heal from it without the disk, and checkpoints are
written from it while training goes on.

    learner-0   update 6 | snapshot 7 | update 7 ...
                               |
                               v                     a task
    object store of its node   state of rank 0 --------------> its second copy, in that of the next node
                               |
                               | a task, if a checkpoint is due
                               v
    disk                       shard-00001-model-00001-of-00001.safetensors

A snapshot is what each rank returns from a call. Ray keeps it in shared memory of the rank's node (on its disk, if
memory is short) for its owner, which is the driver: it outlives the rank's process. Its bytes never go through the
driver, which holds references. Learners execute their calls in order, so a snapshot that is taken between two updates
has the state between them, and nobody waits for it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayError

from rft_cluster.cluster.handles import PEERS, Learners, failure, wait_for
from rft_cluster.cluster.tasks import on_node
from rft_cluster.common.errors import ClusterError
from rft_cluster.learner.snapshot import kept, write_shards
from rft_cluster.messages import WrittenFile

# Made once: Ray would keep each of them for the whole job.
KEEP, WRITE = ray.remote(kept), ray.remote(write_shards)


@dataclass(frozen=True)
class StoredSnapshot:
    """References to all ranks' states after `step` steps, by rank."""

    step: int
    states: Sequence[ray.ObjectRef]
    copies: Sequence[ray.ObjectRef]
    """The second copies; none if all learners share a node."""
    stored: Sequence[ray.ObjectRef]
    """Each is ready when one of `states` or `copies` is stored."""

    @property
    def status(self) -> Literal["whole", "on its way", "lost"]:
        ready, waiting = ray.wait(list(self.stored), num_returns=len(self.stored), timeout=0)
        try:
            ray.get(ready)
        except RayError:  # of a rank that died, or of a node
            return "lost"
        return "on its way" if waiting else "whole"


class Snapshots:
    """The newest whole snapshot, and those that are on their way. A snapshot is whole with all ranks' states and their
    second copies."""

    def __init__(self) -> None:
        self._taken: list[StoredSnapshot] = []  # oldest first
        self._nodes_of: tuple[list[ActorHandle], list[str]] = [], []

    def take(self, learners: Learners, step: int) -> None:
        """Begin a snapshot of the learners' state after `step` steps, unless the one before is still on its way: memory
        is planned for two. Returns without waiting."""
        whole = self.newest() is not None
        if len(self._taken) == whole:
            self._taken.append(self._begin(learners, step))

    def newest(self) -> int | None:
        """The step of the newest whole snapshot; None without one. Older ones are dropped here."""
        found = [(snapshot, snapshot.status) for snapshot in self._taken]
        left = [(snapshot, status) for snapshot, status in found if status != "lost"]
        whole = [i for i, (_, status) in enumerate(left) if status == "whole"]
        self._taken = [snapshot for snapshot, _ in left[whole[-1] if whole else 0 :]]
        return self._taken[0].step if whole else None

    def restore(self, learners: Learners) -> int | None:
        """Put the newest whole snapshot into learners that have just joined. Returns its step.

        None if there is no snapshot of as many ranks, or if its memory is lost. The learners are unchanged then.

        Raises:
            ClusterError: a learner died, or did not answer in time; or a part of the snapshot's memory is lost.
        """
        whole = self.newest() is not None
        self._taken = self._taken[:whole]  # what was on its way is of learners that are gone
        for snapshot in self._taken:
            if len(snapshot.states) == len(learners) and _put_back(learners, snapshot):
                return snapshot.step
        self._taken = []
        return None

    def write(self, learners: Learners, step: int, folder: Path) -> "Writing":
        """Begin to write each rank's file of a checkpoint of `step` to a folder. Returns without waiting."""
        nodes = self._nodes(learners)
        known = [snapshot.states for snapshot in self._taken if snapshot.step == step]
        states = known[0] if known else _states(learners, step)[0]
        calls = {
            WRITE.options(**_once_on(node)).remote(str(folder.absolute()), state): f"{name} (its checkpoint)"
            for name, node, state in zip(learners.names, nodes, states, strict=True)
        }
        return Writing(calls, learners.timeout)

    def _begin(self, learners: Learners, step: int) -> StoredSnapshot:
        after = _next_nodes(self._nodes(learners))
        states, stored = _states(learners, step)
        copied = [
            KEEP.options(num_returns=2, **_once_on(node)).remote(state)
            for state, node in zip(states, after, strict=False)
        ]
        return StoredSnapshot(step, states, [copy for copy, _ in copied], [*stored, *(news for _, news in copied)])

    def _nodes(self, learners: Learners) -> list[str]:
        """Ray's ids of the learners' nodes, by rank."""

        def node(learner: Any) -> str:  # nested, so sent by value: learners need not import this module
            return ray.get_runtime_context().get_node_id()

        if self._nodes_of[0] != learners.handles:
            self._nodes_of = learners.handles, learners.call_all("__ray_call__", node)
        return self._nodes_of[1]


class Writing:
    """The ranks' files of a checkpoint while tasks on the ranks' nodes write them."""

    def __init__(self, calls: Mapping[ray.ObjectRef, str], timeout: float) -> None:
        """`calls`: each task's, with its rank's name. `timeout`: seconds that they may take."""
        self._calls, self._deadline = calls, time.monotonic() + timeout

    @property
    def done(self) -> bool:
        """True if `wait` would not wait."""
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        late = time.monotonic() > self._deadline
        return late or len(ready) == len(calls) or any(failure(call) for call in ready)

    def wait(self, seconds: float | None = None) -> list[WrittenFile]:
        """The ranks' files, by rank. `seconds`: to wait at most, if not to the deadline.

        Nobody writes any more when this returns or raises.

        Raises:
            ClusterError: a task or a rank died, or did not end in time.
            OSError: of a write, with the file's name.
        """
        left = max(0.0, self._deadline - time.monotonic())
        try:
            return wait_for(self._calls, left if seconds is None else min(left, seconds), "writing")
        except RayError as error:  # no room in the object store, nor on its disk
            self._end()
            raise ClusterError(f"a checkpoint cannot be written: {str(error).strip().splitlines()[-1]}") from error
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        """End all tasks: one that goes on would write into the folder of the next checkpoint."""
        for call in self._calls:
            ray.cancel(call, force=True)
        ray.wait(list(self._calls), num_returns=len(self._calls), timeout=PEERS)


def _states(learners: Learners, step: int) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
    """Begin a snapshot of all ranks: references to the states, and to the news that they are stored. The driver can get
    the news, and so see an error, without getting the state."""
    taken = [handle.snapshot.options(num_returns=2).remote(step) for handle in learners.handles]
    return [state for state, _ in taken], [news for _, news in taken]


def _once_on(node: str) -> dict[str, Any]:
    """Options of a task on a node, or on another if this one was told to leave.

    A task is never tried again: its result may be gone with its node, and what it would be made from as well.
    """
    return on_node(node, soft=True, max_retries=0)


def _next_nodes(nodes: Sequence[str]) -> list[str]:
    """For each rank the node after its own, in a ring of the learners' nodes; none if there is one node."""
    ring = list(dict.fromkeys(nodes))
    after = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return [after[node] for node in nodes] if len(ring) > 1 else []


def _put_back(learners: Learners, snapshot: StoredSnapshot) -> bool:
    """Restore each rank from its state, or from the second copy. Returns False if both are lost."""
    left = dict(zip(learners.names, learners.handles, strict=True))
    for states in (snapshot.states, snapshot.copies):
        state_of = dict(zip(learners.names, states, strict=False))
        calls = {left[name].restore_snapshot.remote(state_of[name]): name for name in left if name in state_of}
        if calls:
            ray.wait(list(calls), num_returns=len(calls), timeout=learners.timeout)
        done = {call: name for call, name in calls.items() if not isinstance(failure(call), ObjectLostError)}
        wait_for(done, learners.timeout, "restore_snapshot")
        left = {name: handle for name, handle in left.items() if name not in done.values()}
    if left and len(left) < len(learners):
        # Others hold the snapshot now, and without a checkpoint nothing would bring them back to the model's weights.
        raise ClusterError(f"the state of {', '.join(left)} in memory is lost with its node")
    return not left
