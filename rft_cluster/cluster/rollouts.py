"""Completions under way: which generator writes what, and when it is given it.

A prompt waits here until a generator has room for it, so that one which is slow, or has long completions, gets fewer
and holds nobody up. Who writes what changes nothing else: seeds hang on prompts, and groups come in their order.
"""

import heapq
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from rft_cluster.cluster.handles import ActorGroup, RewardActor, wait_for
from rft_cluster.common.errors import ClusterError
from rft_cluster.messages import Group, Prompt, Reward, Sampling

# An engine that is full is given its next prompts in parts of its room: it has one part in reserve, and a part comes
# back, and is scored, when its last completion is written.
PARTS = 8
LISTENING = 0.5  # seconds until a feeding thread looks whether it is still wanted


@dataclass(frozen=True)
class _Share:
    """What one generator writes of a rollout: the prompts at `indices`."""

    generator: str
    indices: Sequence[int]
    groups: ray.ObjectRef
    rewards: ray.ObjectRef | None


class Rollout:
    """The completions of some prompts, written or yet to be, and their rewards."""

    def __init__(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, reward: RewardActor | None, timeout: float
    ) -> None:
        self._prompts, self._sampling, self._version = prompts, sampling, version
        self._reward, self._timeout = reward, timeout
        self._shares: list[_Share] = []
        self._given = 0  # prompts that generators have: the first ones
        self._all_given = threading.Event()
        self._error: BaseException | None = None
        if not prompts:
            self._all_given.set()

    @property
    def group_size(self) -> int:
        return self._sampling.group_size

    @property
    def left(self) -> int:
        """Prompts that no generator has yet."""
        return len(self._prompts) - self._given

    def give(self, dealt: Mapping[str, Sequence[int]], part: int, handles: Mapping[str, ActorHandle]) -> list[_Share]:
        """Let generators begin with what `dealt` gives each of those left, at most `part` prompts in a call.

        They are scored as soon as they are written.
        """
        completions, shares = len(self._prompts) * self.group_size, []
        for name, dealt_indices in dealt.items():
            for start in range(0, len(dealt_indices), part):
                indices = [self._given + index for index in dealt_indices[start : start + part]]
                own = [self._prompts[index] for index in indices]
                groups = handles[name].generate.remote(own, self._sampling, self._version)
                rewards = self._reward.score(groups, completions) if self._reward else None
                shares.append(_Share(name, indices, groups, rewards))
        self._shares += shares
        self._given += sum(len(share.indices) for share in shares)
        if not self.left:
            self._all_given.set()
        return shares

    def fail(self, error: BaseException) -> None:
        """Nothing more will be given out: who waits raises `error`."""
        self._error = error
        self._all_given.set()

    def wait(self) -> tuple[list[Group], list[list[Reward]]]:
        """The groups in the order of their prompts, and the rewards of each; no rewards if none were asked for.

        Raises:
            ClusterError: a generator died, or did not answer in time.
        """
        left = self.left
        while not self._all_given.wait(self._timeout):
            if self.left == left:
                busy = ", ".join(sorted({share.generator for share in self._shares}))
                raise ClusterError(f"{busy}: no room for {left} prompts came within {self._timeout:g} s")
            left = self.left
        if self._error:
            raise self._error
        groups = wait_for({share.groups: share.generator for share in self._shares}, self._timeout, "generate")
        scored = {share.rewards: f"the reward of {share.generator}" for share in self._shares if share.rewards}
        rewards = wait_for(scored, self._timeout, "score")
        return self._in_order(groups), self._in_order(rewards)

    def _in_order(self, answers: Sequence[Sequence[Any]]) -> list[Any]:
        placed = {
            index: part
            for share, answer in zip(self._shares, answers, strict=False)
            for index, part in zip(share.indices, answer, strict=True)
        }
        return [placed[index] for index in sorted(placed)]


class Generators(ActorGroup):
    """The generators, and the prompts that wait for one."""

    def __init__(self, handles: dict[str, ActorHandle], timeout: float, max_concurrent: int) -> None:
        """`max_concurrent`: completions that an engine writes at once."""
        super().__init__(handles, timeout)
        self._max_concurrent = max_concurrent
        self._lock = threading.Lock()  # of what follows
        self._under_way: dict[ray.ObjectRef, tuple[str, int]] = {}  # who writes it, and how many completions
        self._waiting: deque[Rollout] = deque()
        self._feeding: threading.Thread | None = None

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, reward: RewardActor | None = None
    ) -> Rollout:
        """Begin to write completions with weights of `version` or newer ones, and to score them, without waiting."""
        rollout = Rollout(prompts, sampling, version, reward, self._timeout)
        with self._lock:
            if prompts:
                self._waiting.append(rollout)
            self._give()
            if self._waiting and not self._feeding:
                self._feeding = threading.Thread(target=self._feed, name="feeding", daemon=True)
                self._feeding.start()
        return rollout

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Groups in the order of `prompts`."""
        return self.start(prompts, sampling, version).wait()[0]

    def close(self) -> None:
        """Give out nothing more."""
        with self._lock:
            self._waiting.clear()
            feeding = self._feeding
        if feeding:
            feeding.join()

    def _feed(self) -> None:
        """In a thread, while prompts wait: the loop may be busy with learners meanwhile."""
        try:
            while under_way := self._fed():
                ray.wait(under_way, timeout=LISTENING, fetch_local=False)
        except BaseException as error:  # noqa: BLE001 - not swallowed: everybody who waits for completions raises it
            with self._lock:
                while self._waiting:
                    self._waiting.popleft().fail(error)
                self._feeding = None

    def _fed(self) -> list[ray.ObjectRef]:
        """Give out what there is room for. If prompts still wait: what is under way, and will make room."""
        with self._lock:
            self._give()
            if self._waiting:
                return list(self._under_way)
            self._feeding = None
            return []

    def _give(self) -> None:
        """Fill the room that all generators have by now, first come, first served."""
        if self._under_way:
            done, _ = ray.wait(list(self._under_way), num_returns=len(self._under_way), timeout=0, fetch_local=False)
            for reference in done:
                del self._under_way[reference]
        while self._waiting:
            rollout = self._waiting[0]
            busy = dict.fromkeys(self._handles, 0)
            for name, completions in self._under_way.values():
                busy[name] += completions
            part = -(-self._max_concurrent // (rollout.group_size * PARTS))
            dealt = deal(busy, rollout.left, rollout.group_size, self._max_concurrent + part * rollout.group_size)
            # What fits goes in one call, in which the order in the engine is certain, as are its numbers' last bits.
            fits = sum(map(len, dealt.values())) == rollout.left
            for share in rollout.give(dealt, rollout.left if fits else part, self._handles):
                self._under_way[share.groups] = (share.generator, len(share.indices) * rollout.group_size)
            if rollout.left:
                return
            self._waiting.popleft()


def deal(busy: dict[str, int], count: int, size: int, most: int) -> dict[str, list[int]]:
    """Deal up to `count` prompts of `size` completions to generators that have `busy` completions each.

    Always to the least busy, the first of equals, until all have been dealt or no generator would stay within `most`;
    one that has nothing is always given something. Returns the indices of each one's prompts, without generators that
    have none. n log(generators).
    """
    heap = [(completions, position, name) for position, (name, completions) in enumerate(busy.items())]
    heapq.heapify(heap)
    dealt: dict[str, list[int]] = {}
    for index in range(count):
        completions, position, name = heap[0]
        if completions and completions + size > most:
            break
        dealt.setdefault(name, []).append(index)
        heapq.heapreplace(heap, (completions + size, position, name))
    return dealt
