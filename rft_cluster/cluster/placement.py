"""Compute the actors and resources of a configuration, before anything starts (pure)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rft_cluster.common.errors import NoRoom
from rft_cluster.config import Config

WITHOUT_GPUS = "cluster.device=cpu generators.gpus=0 learners.gpus=0"  # all actors on CPUs


@dataclass(frozen=True)
class ActorPlan:
    """`count` Ray actors of a role, each with `cpus` and `gpus`."""

    role: str
    count: int
    cpus: float
    gpus: float

    @property
    def names(self) -> list[str]:
        """The actors' names in the Ray dashboard."""
        return [f"{self.role}-{index}" for index in range(self.count)] if self.count > 1 else [self.role]


@dataclass(frozen=True)
class NodeResources:
    """The total resources of a Ray node, free or not."""

    node_id: str
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Bundle:
    """Resources reserved together on one node, for the named actors."""

    actors: tuple[str, ...]
    cpus: float
    gpus: float


def plan_actors(config: Config) -> list[ActorPlan]:
    """The actors of a run. Learners come first: they are placed first, so that they are on as few nodes as possible."""
    return [
        ActorPlan("learner", config.learners.count, config.learners.cpus, config.learners.gpus),
        ActorPlan("generator", config.generators.count, config.generators.cpus, config.generators.gpus),
        ActorPlan("reward", 1, 0, 0),
    ]


def describe(config: Config, train_images: int) -> str:
    """The plan as a table for the user."""
    lines = [f"{'actors':<12}{'each: CPUs':>12}{'GPUs':>7}"]
    for actors in plan_actors(config):
        label = f"{actors.count} {actors.role}{'s' if actors.count > 1 else ''}"
        lines.append(f"{label:<12}{actors.cpus:>12g}{actors.gpus:>7g}")
    cpus, gpus = needed(config)
    schedule = config.schedule
    completions = schedule.prompts_per_step * config.completions
    lines += [
        f"{'in all':<12}{cpus:>12g}{gpus:>7g}",
        f"placement   {placement_line(config)}",
        f"each step   {schedule.prompts_per_step} prompts x {config.completions} completions = "
        f"{completions} completions, {-(-completions // config.learners.count)} a learner in micro-batches of "
        f"{config.learners.micro_batch_tokens} tokens at most",
        f"schedule    {schedule.steps} steps; an epoch of {train_images} images is "
        f"{train_images / schedule.prompts_per_step:g} steps",
    ]
    return "\n".join(lines)


def placement_line(config: Config) -> str:
    if config.shares_gpus:
        return "each generator shares its GPU with a learner: it sleeps while the learner works"
    return "on as few nodes as possible, by what is free when the run starts"


def needed(config: Config) -> tuple[float, float]:
    """(CPUs, GPUs) reserved for all actors together."""
    reserved = bundles(config)
    return sum(bundle.cpus for bundle in reserved), sum(bundle.gpus for bundle in reserved)


def bundles(config: Config, training: bool = True) -> list[Bundle]:
    """The bundles to reserve: one for each learner and each generator, or one for both if they share a GPU.

    Without training there are only generators.
    """
    learners, generators, _ = plan_actors(config)
    # A whole GPU for each that is shared: two bundles of half a GPU or less might be put onto the same one.
    if not training:
        gpus = 1 if config.shares_gpus else generators.gpus
        return [Bundle((name,), generators.cpus, gpus) for name in generators.names]
    if config.shares_gpus:
        pairs = zip(learners.names, generators.names, strict=True)
        return [Bundle(pair, learners.cpus + generators.cpus, 1) for pair in pairs]
    return [Bundle((name,), actors.cpus, actors.gpus) for actors in (learners, generators) for name in actors.names]


def split_needed(config: Config, wanted: Sequence[Bundle]) -> tuple[Sequence[Bundle], Sequence[Bundle]]:
    """`wanted`, in order, as (those that a run needs to start, those of generators beyond `generators.min`)."""
    least = config.generators.min
    learners = [bundle for bundle in wanted if any(name.startswith("learner") for name in bundle.actors)]
    if least is None or not learners or config.shares_gpus:
        return wanted, []
    return wanted[: len(learners) + least], wanted[len(learners) + least :]


def place(config: Config, nodes: Sequence[NodeResources], training: bool = True) -> list[NodeResources]:
    """A node for each bundle that the run needs, in the order of `bundles`, on a cluster that runs nothing else.

    This only informs the user, and refuses runs that the cluster can never hold. Ray itself packs the bundles into free
    resources (`reservation.py`). Learners get as few nodes as possible, because they communicate at every layer.
    Generators get the rest, largest node first. If a generator with several GPUs then has no room, generators choose
    first.

    Raises:
        NoRoom: the cluster has too few CPUs or GPUs, or its nodes are too small.
    """
    wanted, _ = split_needed(config, bundles(config, training))
    _check_totals(wanted, nodes)
    learner_count = config.learners.count if training else 0
    learners, generators = list(range(learner_count)), list(range(learner_count, len(wanted)))
    for first, second in ((learners, generators), (generators, learners)):
        free = [[node.cpus, node.gpus] for node in nodes]
        chosen: dict[int, int] = {}
        for group in (first, second):
            chosen |= _pack([wanted[index] for index in group], group, free)
        if len(chosen) == len(wanted):
            return [nodes[chosen[index]] for index in range(len(wanted))]
    largest = max(wanted, key=lambda bundle: (bundle.gpus, bundle.cpus))
    raise NoRoom(
        f"the cluster has enough in all, but scattered over its {len(nodes)} nodes it does not hold "
        f"{len(wanted)} bundles, the largest ({' with '.join(largest.actors)}) of {largest.cpus:g} CPUs and "
        f"{largest.gpus:g} GPUs: the nodes have " + _listed(nodes)
    )


def _pack(group: Sequence[Bundle], indices: Sequence[int], free: list[list[float]]) -> dict[int, int]:
    """The node of each bundle of one kind. Subtracts their resources from `free` ([cpus, gpus] a node)."""
    chosen: dict[int, int] = {}
    rest = list(zip(indices, group, strict=True))
    while rest:
        bundle = rest[0][1]
        rooms = [_room(bundle, cpus, gpus) for cpus, gpus in free]
        if max(rooms, default=0) == 0:
            break
        # Choose the smallest node with room for all remaining bundles, else the one with room for most.
        holding_all = [node for node, room in enumerate(rooms) if room >= len(rest)]
        node = (
            min(holding_all, key=lambda n: (rooms[n], n))
            if holding_all
            else max(range(len(free)), key=rooms.__getitem__)
        )
        for index, placed in rest[: rooms[node]]:
            chosen[index] = node
            free[node][0] -= placed.cpus
            free[node][1] -= placed.gpus
        rest = rest[rooms[node] :]
    return chosen


def _room(bundle: Bundle, cpus: float, gpus: float) -> int:
    """The number of such bundles that fit into a node's free resources."""
    fits = [math.floor(has / need + 1e-9) for has, need in ((cpus, bundle.cpus), (gpus, bundle.gpus)) if need]
    return min(fits, default=1_000_000)


def _check_totals(wanted: Sequence[Bundle], nodes: Sequence[NodeResources]) -> None:
    for name, need, has in (
        ("GPUs", sum(bundle.gpus for bundle in wanted), sum(node.gpus for node in nodes)),
        ("CPUs", sum(bundle.cpus for bundle in wanted), sum(node.cpus for node in nodes)),
    ):
        if need > has:
            without = "" if has or name == "CPUs" else f". Without GPUs: {WITHOUT_GPUS}"
            raise NoRoom(
                f"the run needs {need:g} {name}, the cluster has {has:g} on {len(nodes)} node(s): lower "
                f"generators.count, learners.count or their {name.lower()}, or add nodes{without}"
            )
    for bundle in wanted:
        if not any(_room(bundle, node.cpus, node.gpus) for node in nodes):
            raise NoRoom(
                f"no node has {bundle.cpus:g} CPUs and {bundle.gpus:g} GPUs for {' with '.join(bundle.actors)}: the "
                f"nodes have {_listed(nodes)}"
            )


def _listed(nodes: Sequence[NodeResources]) -> str:
    shown = [f"{node.address} {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes[:8]]
    return "; ".join(shown) + ("; ..." if len(nodes) > 8 else "")


def describe_placement(config: Config, nodes: Sequence[NodeResources]) -> str:
    """A possible placement, for the user. Ray decides by the resources that are free at the start."""
    placed = zip(split_needed(config, bundles(config))[0], place(config, nodes), strict=True)
    return by_host({name: node.address for bundle, node in placed for name in bundle.actors})


def by_host(addresses: Mapping[str, str]) -> str:
    """One line a host with its actors. `addresses`: actor's name -> its host's address."""
    held: dict[str, list[str]] = {}
    for name, address in addresses.items():
        held.setdefault(address, []).append(name)
    return "\n".join(f"  {address}: {', '.join(names)}" for address, names in held.items())
