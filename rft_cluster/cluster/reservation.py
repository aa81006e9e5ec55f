"""Room for a run's actors: Ray's placement groups.

    learners           one group. They communicate at every layer, so Ray places it on as few nodes as possible.
    each generator     a group of its own. A generator beyond `generators.min` may get its room later.
    on a shared GPU    one group for all; each bundle holds a learner and its generator

No bundle is bound to a node: Ray uses what is free. Ray also moves a bundle whose node is lost, but while no node has
room for it, Ray 2.60 tries without a pause (150,000 times a second, on the head). So a group that lost a node is given
back and made anew: Ray tries a new one once in a while.
"""

import random
import time
from collections.abc import Collection, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from rft_cluster.cluster.placement import Bundle, split_needed
from rft_cluster.common.errors import Taken
from rft_cluster.config import Config

RESERVE_TIMEOUT = 60.0  # seconds after which resources count as taken by others
ATTEMPT = 5.0  # seconds of the first attempt; each further one takes twice as long
PAUSE = (1.0, 3.0)  # seconds between two, at least and at most


class Room:
    """A placement group, and the bundles that it holds."""

    def __init__(self, name: str, bundles: Sequence[Bundle]) -> None:
        self.bundles = bundles
        self._name, self._made = name, 0

    def make(self) -> None:
        """Ask for the room. Returns without waiting."""
        self._made += 1
        # Ray refuses the name of a group that was just given back.
        name = self._name if self._made == 1 else f"{self._name}.{self._made}"
        needs = [{name: has for name, has in (("CPU", b.cpus), ("GPU", b.gpus)) if has} for b in self.bundles]
        self.group = placement_group(needs, strategy="PACK", name=name)

    def is_made_within(self, seconds: float) -> bool:
        return bool(self.group.wait(max(0.0, seconds)))

    @property
    def state(self) -> str:
        """CREATED, PENDING, or RESCHEDULING after the loss of a node."""
        return str(placement_group_table(self.group)["state"])

    def give_back(self) -> None:
        remove_placement_group(self.group)


class Reservation:
    """The rooms of all actors of a run."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._rooms = rooms
        self._places = {
            name: (room, index) for room in rooms for index, held in enumerate(room.bundles) for name in held.actors
        }

    @property
    def groups(self) -> list[PlacementGroup]:
        return [room.group for room in self._rooms]

    def place(self, actor: str) -> tuple[PlacementGroup, int] | None:
        """The group and the index of the actor's bundle; None for an actor that needs no room."""
        if actor not in self._places:
            return None
        room, index = self._places[actor]
        return room.group, index

    def is_placed(self, actor: str) -> bool:
        """False for an actor whose room is yet to come, or is lost with its node."""
        return actor not in self._places or self._places[actor][0].state == "CREATED"

    def renew(self, actors: Collection[str]) -> None:
        """Make the rooms of these actors anew that have lost a node. All actors of such a room must have ended."""
        for room in self._rooms:
            if any(name in actors for held in room.bundles for name in held.actors) and room.state == "RESCHEDULING":
                room.give_back()
                room.make()

    def give_back(self) -> None:
        _give_back(self._rooms)


def reserve(config: Config, wanted: Sequence[Bundle]) -> Reservation:
    """Reserve all bundles that the run needs, and ask for the others.

    Raises:
        Taken: others hold the resources.
    """
    needed, later = split_needed(config, wanted)
    rooms, own = _rooms(config, needed), _rooms(config, later)
    deadline, order = time.monotonic() + min(RESERVE_TIMEOUT, config.cluster.start_timeout), rooms
    seconds = ATTEMPT
    while True:
        missing = taken(needed)  # now, when this run holds nothing
        if _made(order, seconds):
            break
        seconds *= 2  # a busy cluster takes its time
        _give_back(order)
        if time.monotonic() >= deadline:
            raise Taken(missing or "the cluster has room, but in parts that are too small: wait for other jobs")
        # Large generators may find no room beside learners that chose first; next time they do.
        order = order[::-1]
        # Ray counts what was given back a moment later. And of two runs that each hold what the other lacks, one comes
        # first.
        time.sleep(random.uniform(*PAUSE))
    _made(own, ATTEMPT)
    return Reservation([*rooms, *own])


def _rooms(config: Config, bundles: Sequence[Bundle]) -> list[Room]:
    name = f"rft-{config.run.name}"
    if config.shares_gpus:
        return [Room(name, bundles)] if bundles else []
    learners = [bundle for bundle in bundles if bundle.actors[0].startswith("learner")]
    own = [Room(f"{name}-{bundle.actors[0]}", [bundle]) for bundle in bundles if bundle not in learners]
    return [Room(f"{name}-learners", learners), *own] if learners else own


def _made(rooms: Sequence[Room], seconds: float) -> bool:
    for room in rooms:
        room.make()
    deadline = time.monotonic() + seconds
    return all([room.is_made_within(deadline - time.monotonic()) for room in rooms])


def _give_back(rooms: Sequence[Room]) -> None:
    for room in rooms:
        room.give_back()


def taken(wanted: Sequence[Bundle]) -> str:
    """A message about resources of the bundles that others hold; empty if all are free."""
    free = ray.available_resources()
    needs = {"CPU": sum(bundle.cpus for bundle in wanted), "GPU": sum(bundle.gpus for bundle in wanted)}
    if all(free.get(name, 0) + 1e-6 >= need for name, need in needs.items()):
        return ""
    return (
        f"the cluster is large enough, but its resources are taken: {free.get('CPU', 0):g} CPUs and "
        f"{free.get('GPU', 0):g} GPUs are free, {needs['CPU']:g} and {needs['GPU']:g} are needed. Stop other jobs or "
        f"wait."
    )
