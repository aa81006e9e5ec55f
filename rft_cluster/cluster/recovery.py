"""Replace what is lost while the run goes on.

    lost               what happens, in the same run
    a generator        the others write what it owed. A fresh one starts meanwhile, and serves when it has been sent the
                       weights. With too few left, the run waits for it.
    the reward actor   a fresh one scores what is not scored
    a learner          all ranks start afresh: FSDP keeps its process group, and a rank inside a collective can be told
                       nothing. The loop then begins again at the step whose state they get.

Whoever is past a deadline is ended and counts as lost. On a GPU that a generator and a learner share, an engine must
start before the learner takes its memory, so there all actors start again (`launch`).
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import ray
from ray.actor import ActorHandle

from rft_cluster.cluster.actors import Actors, ask_addresses
from rft_cluster.cluster.ending import end
from rft_cluster.cluster.handles import ActorGroup, Learners, RewardActor, failure
from rft_cluster.cluster.machine import address_here
from rft_cluster.cluster.nodes import told_to_leave
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.common.errors import ClusterError, UserError, WeightTransferError

Again = Callable[[Exception, str], bool]
"""Called with an error and the words for what is done about it, before each replacement: may it be made?"""


def never(error: Exception, doing: str) -> bool:
    """The `Again` of a cluster in which nothing is replaced."""
    return False


class Recovery:
    """See the module. It alone changes which actors the groups hold."""

    def __init__(
        self,
        actors: Actors,
        generators: Generators,
        receivers: ActorGroup,
        reward: RewardActor,
        learners: Learners,
        weights: WeightSync,
        addresses: dict[str, str],
        again: Again,
    ) -> None:
        """
        Args:
            generators: that get prompts.
            receivers: the generators that get weights; a fresh one does before it gets prompts.
            addresses: of all actors' hosts, by the actors' names; kept current here.
        """
        self._actors, self._generators, self._receivers, self._reward = actors, generators, receivers, reward
        self._learners, self._weights, self._addresses, self._again = learners, weights, addresses, again
        # Fresh generators that start, and the calls that they answer when they are ready.
        self._coming: dict[str, tuple[ActorHandle, ray.ObjectRef]] = {}
        self._failed_starts: Counter[str] = Counter()
        self._without_room: set[str] = set()  # of the fresh ones, as the user was told
        self._placed: dict[str, float] = {}  # of the fresh ones, the time since when each is known to have room
        self._leaving: set[str] = set()  # addresses, as the user was told
        self._least = actors.config.generators.min or 1

    def replace(self, error: ClusterError) -> None:
        """Replace generators and the reward actor that `error` tells of.

        Raises:
            ClusterError: `error`, if anything else was lost, or if nothing may be replaced any more.
        """
        generators = error.lost & {*self._receivers.names}
        reward = error.lost & {*self._reward.names}
        refused = isinstance(error, WeightTransferError)
        if error.lost - generators - reward or not (error.lost or refused) or self._actors.config.shares_gpus:
            raise error
        what = f"{', '.join(sorted(error.lost))} starts afresh" if error.lost else "the weights are sent again"
        if not self._again(error, what):
            raise error
        if reward:
            self._actors.begin()
            self._reward.kill()
            fresh = self._actors.start_reward()
            self._reward.replace(fresh)
            try:
                self._addresses |= self._actors.wait_until_ready(fresh)
            except UserError as refused_again:  # it has started before: its new node lacks something
                raise ClusterError(str(refused_again), self._reward.names) from refused_again
        for name in sorted(generators):
            self._lose(name)
        if generators or refused:
            # Weights that were refused are never verified; those that a lost generator held need not be.
            self._weights.reconnect(lost=generators, verified=not refused)
        self._generators.losses += 1

    @property
    def coming(self) -> list[str]:
        """The generators that start."""
        return list(self._coming)

    @property
    def too_few(self) -> bool:
        """True if fewer generators serve than the run needs."""
        return len(self._generators) < self._least

    def news_of_leaving(self) -> str:
        """A line about hosts of actors, or of this process, that were told to leave since the last call; empty if there
        are none."""
        leaving = told_to_leave() if self._actors.config.cluster.joins else {}
        hosts = {**self._addresses, "the driver": address_here()} if leaving else {}
        lines = []
        for address in leaving.keys() - self._leaving:
            if names := [name for name, host in hosts.items() if host == address]:
                within = "" if math.isinf(leaving[address]) else f" within {leaving[address]:.0f} s"
                lines.append(f"{address} ({', '.join(names)}) was told to leave{within}")
        self._leaving = {*leaving}
        return "; ".join(sorted(lines))

    def _lose(self, name: str) -> None:
        self._receivers.remove(name)
        if name in self._generators.names:
            self._generators.remove(name)
        self._start(name)

    def _start(self, name: str) -> None:
        self._actors.begin()
        self._without_room.discard(name)
        (handle,) = self._actors.start_generators([name]).values()
        self.expect(name, handle)

    def expect(self, name: str, handle: ActorHandle) -> None:
        """Take up a generator that starts, when it is ready."""
        (call,) = ask_addresses({name: handle})
        self._coming[name] = handle, call
        self._placed.pop(name, None)

    def take_up(self) -> None:
        """Let fresh generators that are ready get weights from now on. With too few others, wait for them.

        Raises:
            ClusterError: too few are ready within `cluster.start_timeout`.
        """
        while self._coming:
            missing = max(0, self._least - len(self._receivers))
            try:
                addresses = self._actors.ready({call: name for name, (_, call) in self._coming.items()}, missing)
            except (ClusterError, UserError) as error:
                self._begin_anew([name for name, (_, call) in self._coming.items() if failure(call)], error)
                continue
            for name, address in addresses.items():
                self._addresses[name] = address
                self._receivers.add(name, self._coming.pop(name)[0])
                del self._failed_starts[name]
                print(f"{name} is ready, and gets the weights", flush=True)
            if addresses:
                self._weights.reconnect()
            without = {name for name in self._coming if not self._actors.is_placed(name)}
            self._say_who_has_no_room(without)
            self._end_who_hangs(without)
            return

    def _say_who_has_no_room(self, without: set[str]) -> None:
        """Once for each loss."""
        if new := sorted(without - self._without_room):
            print(f"no node has room for {', '.join(new)} now: the run goes on without until then", flush=True)
        self._without_room |= without

    def _end_who_hangs(self, without: set[str]) -> None:
        """Begin anew with those that have had room for `cluster.start_timeout`. Nobody waits for them, so nobody else
        would see that one hangs. `without`: those that have no room, who wait for it as long as the run lasts."""
        now, most = time.monotonic(), self._actors.config.cluster.start_timeout
        self._placed = {name: self._placed.get(name, now) for name in self._coming if name not in without}
        if late := [name for name, since in self._placed.items() if now - since >= most]:
            end(self._coming[name][0] for name in late)
            error = ClusterError(f"{', '.join(late)}: not ready within cluster.start_timeout ({most:g} s)", late)
            self._begin_anew(late, error)

    def _begin_anew(self, failed: Sequence[str], error: ClusterError | UserError) -> None:
        """Start generators again that died or hung while they started; give those up that always do."""
        for name in failed:
            del self._coming[name]
            self._failed_starts[name] += 1
            # Also after a UserError: what has started before is no mistake. The memory of who was lost may not be free.
            if self._failed_starts[name] <= self._actors.config.cluster.restarts:
                print(f"WARNING: {error}\n{name} starts once more", flush=True)
                self._start(name)
            else:
                print(f"WARNING: {error}\n{name} is given up, and the run goes on without it", flush=True)
        if not failed or len(self._receivers) + len(self._coming) < self._least:
            raise ClusterError(str(error)) from error

    def serve_fresh(self) -> None:
        """Give prompts to the generators that have been sent weights since they were taken up."""
        for name, handle in zip(self._receivers.names, self._receivers.handles, strict=True):
            if name not in self._generators.names:
                self._generators.add(name, handle)

    def restart_learners(self, error: ClusterError) -> None:
        """Start all learners afresh. They hold the model's first weights then; see
        `Cluster.restore_snapshot`.

        A fresh one may be lost, too: Ray starts it on a node that it does not know to be gone.

        Raises:
            ClusterError: if no learner was lost, if they find no room, or if nothing may be replaced any more.
        """
        while True:
            if not error.lost & {*self._learners.names} or self._actors.config.shares_gpus:
                raise error
            if not self._again(error, "the learners start afresh"):
                raise error
            try:
                return self._start_learners(error)
            except ClusterError as another:
                error = another
            except UserError as another:
                # What has started before is no mistake. A rank hears of a peer's loss so, too.
                error = ClusterError(str(another), self._learners.names)

    def _start_learners(self, error: ClusterError) -> None:
        self._generators.forget()
        for name in sorted(error.lost & {*self._receivers.names}):  # the other end of a transfer that hangs
            self._lose(name)
        self._learners.kill()
        self._actors.begin()
        fresh = self._actors.start_learners()
        self._learners.replace(fresh)
        # Nobody waits for what the engines still write, nor for this: one may have been lost with the learner.
        self._receivers.begin_all("abort")
        self._addresses |= self._actors.wait_until_ready(fresh)
        self._learners.join(self._addresses, self._actors.left(), self._actors.grows)
        self._weights.reconnect(verified=False)
