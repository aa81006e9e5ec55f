"""Dispatch prompts to generators, and collect their completions and rewards.

A prompt waits here until a generator has room. So a generator that is slow, or has long completions, gets fewer prompts
and does not delay the others. The choice of the generator changes no result: seeds depend on the prompt, and groups
come back in the order of the prompts.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from rft_cluster.cluster.handles import ActorGroup, RewardActor, wait_for
from rft_cluster.common.errors import ClusterError
from rft_cluster.messages import Group, Prompt, Reward, Sampling

# A busy engine is topped up in chunks of 1/8 of its capacity, one chunk in advance. A chunk comes back, and is scored,
# when its last completion is finished.
CHUNKS = 8
LISTENING = 0.5  # seconds after which the dispatch thread checks whether it is still needed
# Starts the verification of the served weights. Returns the learners' calls that it waits for, with their names.
Verify = Callable[[], dict[ray.ObjectRef, str]]


@dataclass(frozen=True)
class _Chunk:
    """The prompts at `indices` of a rollout, dispatched to one generator in one call."""

    generator: str
    indices: Sequence[int]
    groups: ray.ObjectRef
    rewards: ray.ObjectRef | None


class Rollout:
    """The completions of some prompts and their rewards, finished or not."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        version: int,
        reward: RewardActor | None,
        timeout: float,
        verify: Verify = dict,
    ) -> None:
        self._prompts, self._sampling, self._version = prompts, sampling, version
        self._reward, self._timeout, self._verify = reward, timeout, verify
        self._chunks: list[_Chunk] = []
        self._dispatched = 0  # the first so many prompts have been dispatched
        self._all_dispatched = threading.Event()
        self._error: BaseException | None = None
        if not prompts:
            self._all_dispatched.set()

    @property
    def group_size(self) -> int:
        return self._sampling.group_size

    @property
    def left(self) -> int:
        """Number of prompts that are not dispatched yet."""
        return len(self._prompts) - self._dispatched

    def dispatch(
        self, assigned: Mapping[str, Sequence[int]], chunk_size: int, handles: Mapping[str, ActorHandle]
    ) -> list[_Chunk]:
        """Send generators their prompts, in chunks of at most `chunk_size`, and have them scored when finished.

        `assigned`: generator's name -> indices among the prompts that are left.
        """
        completions, chunks = len(self._prompts) * self.group_size, []
        for name, assigned_indices in assigned.items():
            for start in range(0, len(assigned_indices), chunk_size):
                indices = [self._dispatched + index for index in assigned_indices[start : start + chunk_size]]
                own = [self._prompts[index] for index in indices]
                groups = handles[name].generate.remote(own, self._sampling, self._version)
                # The scorer gets a reference: it starts when the groups are there, without a word from the driver.
                rewards = self._reward.score(groups, completions) if self._reward else None
                chunks.append(_Chunk(name, indices, groups, rewards))
        self._chunks += chunks
        self._dispatched += sum(len(chunk.indices) for chunk in chunks)
        if not self.left:
            self._all_dispatched.set()
        return chunks

    def fail(self, error: BaseException) -> None:
        """Dispatch nothing more; `wait` raises `error`."""
        self._error = error
        self._all_dispatched.set()

    def wait(self) -> tuple[list[Group], list[list[Reward]]]:
        """The groups in the order of their prompts, and their rewards; no rewards for a rollout without a scorer.

        Raises:
            ClusterError: a generator died, or did not answer in time; or a learner died before it gave the digests with
                which the generators verify its weights.
        """
        # Without the digests no group would come: the generators would wait for the verification until their deadline.
        digests = self._verify()
        left = self.left
        while not self._all_dispatched.wait(self._timeout):
            if self.left == left:
                busy = ", ".join(sorted({chunk.generator for chunk in self._chunks}))
                raise ClusterError(f"{busy}: no room for {left} prompts came within {self._timeout:g} s")
            left = self.left
        if self._error:
            raise self._error
        calls = {chunk.groups: chunk.generator for chunk in self._chunks}
        groups = wait_for(calls | digests, self._timeout, "generate")[: len(calls)]
        scored = {chunk.rewards: f"reward (for {chunk.generator})" for chunk in self._chunks if chunk.rewards}
        rewards = wait_for(scored, self._timeout, "score")
        return self._in_order(groups), self._in_order(rewards)

    def _in_order(self, answers: Sequence[Sequence[Any]]) -> list[Any]:
        placed = {
            index: one
            for chunk, answer in zip(self._chunks, answers, strict=False)
            for index, one in zip(chunk.indices, answer, strict=True)
        }
        return [placed[index] for index in sorted(placed)]


class Generators(ActorGroup):
    """The generators, and the rollouts with prompts that wait for one."""

    def __init__(
        self, handles: dict[str, ActorHandle], timeout: float, max_concurrent: int, verify: Verify = dict
    ) -> None:
        """
        Args:
            max_concurrent: completions that an engine generates at once.
            verify: `WeightSync.verify`; left out for weights that are not verified. Called after the dispatch of
                prompts, by whoever waits for their groups: its calls would hold up the dispatch.
        """
        super().__init__(handles, timeout)
        self._max_concurrent, self._verify = max_concurrent, verify
        self._lock = threading.Lock()  # guards the three fields below
        self._in_flight: dict[ray.ObjectRef, tuple[str, int]] = {}  # call -> (generator, number of completions)
        self._waiting: deque[Rollout] = deque()
        self._dispatching: threading.Thread | None = None

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, reward: RewardActor | None = None
    ) -> Rollout:
        """Start completions by weights of `version` or newer, and their scoring. Returns without waiting."""
        rollout = Rollout(prompts, sampling, version, reward, self._timeout, self._verify)
        with self._lock:
            if prompts:
                self._waiting.append(rollout)
            self._dispatch()
            if self._waiting and not self._dispatching:
                self._dispatching = threading.Thread(target=self._dispatch_rest, name="dispatch", daemon=True)
                self._dispatching.start()
        return rollout

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Generate and wait. Returns groups in the order of `prompts`."""
        return self.start(prompts, sampling, version).wait()[0]

    def close(self) -> None:
        """Dispatch nothing more."""
        with self._lock:
            self._waiting.clear()
            dispatching = self._dispatching
        if dispatching:
            dispatching.join()

    def _dispatch_rest(self) -> None:
        """Dispatch the waiting prompts. Runs in a thread, because the loop may be busy with the learners."""
        try:
            while in_flight := self._calls_to_wait_for():
                ray.wait(in_flight, timeout=LISTENING, fetch_local=False)
        except BaseException as error:  # noqa: BLE001 - not swallowed: everybody who waits for completions raises it
            with self._lock:
                while self._waiting:
                    self._waiting.popleft().fail(error)
                self._dispatching = None

    def _calls_to_wait_for(self) -> list[ray.ObjectRef]:
        """Dispatch as many prompts as there is room for. If prompts still wait, return the calls in flight."""
        with self._lock:
            self._dispatch()
            if self._waiting:
                return list(self._in_flight)
            self._dispatching = None
            return []

    def _dispatch(self) -> None:
        """Fill the room of all generators, first come, first served."""
        # Calls that are done have made room. Nothing is fetched here: only the scorer and the driver need the groups.
        if self._in_flight:
            done, _ = ray.wait(list(self._in_flight), num_returns=len(self._in_flight), timeout=0, fetch_local=False)
            for reference in done:
                del self._in_flight[reference]
        while self._waiting:
            rollout = self._waiting[0]
            busy = dict.fromkeys(self._handles, 0)
            for name, completions in self._in_flight.values():
                busy[name] += completions
            # One chunk beyond the capacity: the engine then never runs empty while its next chunk travels.
            chunk_size = -(-self._max_concurrent // (rollout.group_size * CHUNKS))
            most = self._max_concurrent + chunk_size * rollout.group_size
            assigned = assign(busy, rollout.left, rollout.group_size, most)
            # If everything fits, send one call per generator: a fixed batch order makes results bitwise reproducible.
            fits = sum(map(len, assigned.values())) == rollout.left
            for chunk in rollout.dispatch(assigned, rollout.left if fits else chunk_size, self._handles):
                self._in_flight[chunk.groups] = (chunk.generator, len(chunk.indices) * rollout.group_size)
            # A later rollout waits until all prompts of this one are dispatched.
            if rollout.left:
                return
            self._waiting.popleft()


def assign(busy: dict[str, int], count: int, size: int, most: int) -> dict[str, list[int]]:
    """Assign up to `count` prompts of `size` completions to generators with `busy` completions each.

    The next prompt goes to the least busy generator (the first of equals), until all are assigned or every generator
    would exceed `most`. An idle generator always gets a prompt. Returns the indices of each generator's prompts,
    without generators that get none. n log(generators).
    """
    heap = [(completions, position, name) for position, (name, completions) in enumerate(busy.items())]
    heapq.heapify(heap)
    assigned: dict[str, list[int]] = {}
    for index in range(count):
        completions, position, name = heap[0]
        if completions and completions + size > most:
            break
        assigned.setdefault(name, []).append(index)
        heapq.heapreplace(heap, (completions + size, position, name))
    return assigned
