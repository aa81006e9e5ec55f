"""Dispatch prompts to generators, and collect their completions and rewards.

A prompt waits here until a generator has room. So a generator that is slow, or has long completions, gets fewer prompts
and does not delay the others. The choice of the generator changes no result: seeds depend on the prompt, and groups
come back in the order of the prompts.
"""

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle

from rft_cluster.cluster.handles import LOOK, LOSSES, ActorGroup, RewardActor, failure, named, unanswered, wait_for
from rft_cluster.common.errors import ClusterError, EngineFailed, WeightTransferError
from rft_cluster.messages import Group, Prompt, Reward, Sampling

# A busy engine is topped up in chunks of 1/8 of its capacity, one chunk in advance. A chunk comes back, and is scored,
# when its last completion is finished.
CHUNKS = 8
LISTENING = 0.5  # seconds after which the dispatch thread checks whether it is still needed
# Errors after which another generator, or the same one with the weights sent again, can write a chunk.
PASSING = (*LOSSES, EngineFailed, WeightTransferError)
# Starts the verification of the served weights. Returns the learners' calls that it waits for, with their names.
Verify = Callable[[], dict[ray.ObjectRef, str]]
# Replaces what was lost, or raises the error.
Recover = Callable[[ClusterError], None]


def give_up(error: ClusterError) -> None:
    """The `Recover` of generators that nobody replaces."""
    raise error


@dataclass(frozen=True)
class _Chunk:
    """The prompts at `indices` of a rollout, dispatched in one call to a generator, and its groups to a scorer."""

    generator: str
    indices: Sequence[int]
    groups: ray.ObjectRef
    rewards: ray.ObjectRef | None
    writer: ActorHandle
    scorer: ActorHandle | None


class Rollout:
    """The completions of some prompts and their rewards, finished or not."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        version: int,
        pool: "Generators",
        reward: RewardActor | None,
    ) -> None:
        self._prompts, self._sampling, self._version = prompts, sampling, version
        self._pool, self._reward = pool, reward
        self._losses = pool.losses
        self._chunks: list[_Chunk] = []
        self._queue = deque(range(len(prompts)))  # indices of the prompts that are not dispatched
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
        return len(self._queue)

    def dispatch(
        self, assigned: Mapping[str, Sequence[int]], chunk_size: int, handles: Mapping[str, ActorHandle]
    ) -> list[_Chunk]:
        """Send generators their prompts, in chunks of at most `chunk_size`, and have them scored when finished.

        `assigned`: generator's name -> indices among the prompts that are left; all from the first to some other.
        """
        head, chunks = list(self._queue), []
        for name, assigned_indices in assigned.items():
            for start in range(0, len(assigned_indices), chunk_size):
                indices = [head[index] for index in assigned_indices[start : start + chunk_size]]
                own = [self._prompts[index] for index in indices]
                groups = named(handles[name], "generate").remote(own, self._sampling, self._version)
                chunks.append(self._scored(_Chunk(name, indices, groups, None, handles[name], None)))
        for _ in range(sum(map(len, assigned.values()))):
            self._queue.popleft()
        self._chunks += chunks
        if not self.left:
            self._all_dispatched.set()
        return chunks

    def _scored(self, chunk: _Chunk) -> _Chunk:
        """The chunk, with its scoring in flight."""
        if not self._reward:
            return chunk
        # The scorer gets a reference: it starts when the groups are there, without a word from the driver.
        rewards = self._reward.score(chunk.groups, len(self._prompts) * self.group_size)
        return replace(chunk, rewards=rewards, scorer=self._reward.handles[0])

    def fail(self, error: BaseException) -> None:
        """Dispatch nothing more; `wait` raises `error`."""
        self._error = error
        self._all_dispatched.set()

    def wait(self) -> tuple[list[Group], list[list[Reward]]]:
        """The groups in the order of their prompts, and their rewards; no rewards for a rollout without a scorer.

        What a lost generator or scorer still owed is asked again of others, under the same seeds.

        Raises:
            ClusterError: something was lost that cannot be replaced; or a learner died before it gave the digests with
                which the generators verify its weights.
        """
        if self._losses != self._pool.losses:
            self._pool.ask_again(self)  # an earlier rollout, or a broadcast, has met the loss
        while True:
            try:
                return self._collected()
            except ClusterError as error:
                self._pool.recover(error)
                self._pool.ask_again(self)

    def _collected(self) -> tuple[list[Group], list[list[Reward]]]:
        timeout = self._pool.timeout
        # Without the digests no group would come: the generators would wait for the verification until their deadline.
        digests = self._pool.verify()
        self._wait_for_room()
        if self._error:
            raise self._error
        calls = {chunk.groups: chunk.generator for chunk in self._chunks}
        groups = wait_for(calls | digests, timeout, "generate", self._pool.meanwhile)[: len(calls)]
        scored = {chunk.rewards: f"reward (for {chunk.generator})" for chunk in self._chunks if chunk.rewards}
        rewards = wait_for(scored, timeout, "score", self._pool.meanwhile)
        return self._in_order(groups), self._in_order(rewards)

    def _wait_for_room(self) -> None:
        """Wait until all prompts are dispatched."""
        left, since = self.left, time.monotonic()
        while not self._all_dispatched.wait(min(LOOK, self._pool.timeout)):
            self._pool.meanwhile()
            if self.left != left:
                left, since = self.left, time.monotonic()
            elif time.monotonic() - since >= self._pool.timeout:
                busy, within = self._pool.busy, f"{self._pool.timeout:g} s"
                raise ClusterError(f"{', '.join(busy)}: no room for {left} prompts came within {within}", busy)

    def take_back(self, handles: Mapping[str, ActorHandle]) -> None:
        """Put the prompts back into the line that nobody will answer: `handles` are the generators that serve.

        What is written but not scored, because the scorer was lost, is scored anew.
        """
        self._losses = self._pool.losses
        kept: list[_Chunk] = []
        back: list[int] = []
        for chunk in self._chunks:
            error = failure(chunk.groups)
            gone = chunk.writer not in handles.values() and not ray.wait([chunk.groups], timeout=0)[0]
            if isinstance(error, PASSING) or gone:
                back += chunk.indices
            elif error is None and self._reward and self._is_unscored(chunk):
                # By value: a node that was lost may have taken the groups with it after they were here.
                written = ray.wait([chunk.groups], timeout=0)[0]
                groups = ray.put(ray.get(chunk.groups)) if written else chunk.groups
                kept.append(self._scored(replace(chunk, groups=groups)))
            else:
                kept.append(chunk)
        self._chunks = kept
        if back:
            self._queue.extendleft(sorted(back, reverse=True))
            self._all_dispatched.clear()

    def _is_unscored(self, chunk: _Chunk) -> bool:
        assert chunk.rewards is not None and self._reward is not None
        if isinstance(failure(chunk.rewards), LOSSES):
            return True
        done = ray.wait([chunk.rewards], timeout=0)[0]
        return not done and chunk.scorer is not self._reward.handles[0]

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
        self._max_concurrent, self.verify = max_concurrent, verify
        self.recover: Recover = give_up
        self.losses = 0
        """Number of losses that were met: a rollout that is older than the last may miss something."""
        self._lock = threading.Lock()  # guards the three fields below
        self._in_flight: dict[ray.ObjectRef, tuple[str, int]] = {}  # call -> (generator, number of completions)
        self._waiting: deque[Rollout] = deque()
        self._dispatching: threading.Thread | None = None

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, reward: RewardActor | None = None
    ) -> Rollout:
        """Start completions by weights of `version` or newer, and their scoring. Returns without waiting."""
        rollout = Rollout(prompts, sampling, version, self, reward)
        with self._lock:
            if prompts:
                self._waiting.append(rollout)
            self._begin_dispatch()
        return rollout

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Generate and wait. Returns groups in the order of `prompts`."""
        return self.start(prompts, sampling, version).wait()[0]

    @property
    def waiting(self) -> int:
        """Number of prompts that wait for a generator."""
        with self._lock:
            return sum(rollout.left for rollout in self._waiting)

    @property
    def busy(self) -> list[str]:
        """The generators with calls in flight."""
        with self._lock:
            return sorted({name for name, _ in self._in_flight.values()})

    def doing(self) -> dict[str, str]:
        """As `ActorGroup.doing`; of generators with prompts how many completions they write."""
        with self._lock:
            in_flight = dict(self._in_flight)
        writing: Counter[str] = Counter()
        for call in unanswered(list(in_flight)):
            name, completions = in_flight[call]
            writing[name] += completions
        return super().doing() | {name: f"write {count} completions" for name, count in writing.items()}

    def remove(self, name: str) -> None:
        """Drop a generator that is lost. What it owes is asked again by whoever waits for it."""
        with self._lock:
            super().remove(name)
            self._in_flight = {call: own for call, own in self._in_flight.items() if own[0] != name}

    def add(self, name: str, handle: ActorHandle) -> None:
        """Take up a generator that has been sent the current weights."""
        with self._lock:
            super().add(name, handle)
            self._begin_dispatch()

    def ask_again(self, rollout: Rollout) -> None:
        """Dispatch again what nobody will answer of a rollout."""
        with self._lock:
            rollout.take_back(self._handles)
            if rollout.left and rollout not in self._waiting:
                self._waiting.appendleft(rollout)
            self._begin_dispatch()

    def forget(self) -> None:
        """Drop all rollouts: nobody waits for them any more."""
        with self._lock:
            self._waiting.clear()
            self._in_flight.clear()

    def close(self) -> None:
        """Dispatch nothing more."""
        with self._lock:
            self._waiting.clear()
            dispatching = self._dispatching
        if dispatching:
            dispatching.join()

    def _begin_dispatch(self) -> None:
        """Dispatch as many prompts as there is room for, and start the thread for the rest."""
        self._dispatch()
        if self._waiting and not self._dispatching:
            self._dispatching = threading.Thread(target=self._dispatch_rest, name="dispatch", daemon=True)
            self._dispatching.start()

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
            # Without a generator nothing is in flight: prompts wait for `ask_again`.
            if self._waiting and self._in_flight:
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
        while self._waiting and self._handles:
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
