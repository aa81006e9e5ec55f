"""What a configuration asks of a cluster, worked out before anything starts (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass

from rft_cluster.config import Config
from rft_cluster.errors import UserError


@dataclass(frozen=True)
class ActorPlan:
    """`count` Ray actors of a role, each with `cpus` and `gpus`."""

    role: str
    count: int
    cpus: float
    gpus: float

    @property
    def names(self) -> list[str]:
        """The names that the actors bear in the Ray dashboard."""
        return [f"{self.role}-{index}" for index in range(self.count)] if self.count > 1 else [self.role]


@dataclass(frozen=True)
class NodeResources:
    """What a Ray node has, free or not."""

    cpus: float
    gpus: float


def plan_actors(config: Config) -> list[ActorPlan]:
    """The actors, learners first: they are placed first, so that they sit together."""
    return [
        ActorPlan("learner", config.learners.count, config.learners.cpus, config.learners.gpus),
        ActorPlan("generator", config.generators.count, config.generators.cpus, config.generators.gpus),
        ActorPlan("reward", 1, 0, 0),
    ]


def describe(config: Config, train_images: int) -> str:
    """The plan as a table for people."""
    lines = [f"{'actors':<12}{'each: CPUs':>12}{'GPUs':>7}"]
    for actors in plan_actors(config):
        label = f"{actors.count} {actors.role}{'s' if actors.count > 1 else ''}"
        lines.append(f"{label:<12}{actors.cpus:>12g}{actors.gpus:>7g}")
    cpus, gpus = needed(config)
    schedule = config.schedule
    completions = schedule.prompts_per_step * config.sampling.group_size
    lines += [
        f"{'in all':<12}{cpus:>12g}{gpus:>7g}",
        "placement   one placement group (PACK): a bundle for each learner, then for each generator",
        f"each step   {schedule.prompts_per_step} prompts x {config.sampling.group_size} completions = "
        f"{completions} completions, {-(-completions // config.learners.count)} a learner in forwards of "
        f"{config.learners.micro_batch}",
        f"schedule    {schedule.steps} steps; an epoch of {train_images} images is "
        f"{train_images / schedule.prompts_per_step:g} steps",
    ]
    return "\n".join(lines)


def needed(config: Config) -> tuple[float, float]:
    """CPUs and GPUs of all actors together."""
    actors = plan_actors(config)
    return sum(a.count * a.cpus for a in actors), sum(a.count * a.gpus for a in actors)


def check_fits(config: Config, nodes: Sequence[NodeResources]) -> None:
    """Can the cluster hold the actors at all?

    Raises:
        UserError: it lacks CPUs or GPUs, or no node is large enough for one actor.
    """
    cpus, gpus = needed(config)
    has_cpus, has_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    for name, need, has in (("GPUs", gpus, has_gpus), ("CPUs", cpus, has_cpus)):
        if need > has:
            raise UserError(
                f"the run needs {need:g} {name}, the cluster has {has:g} on {len(nodes)} node(s): lower "
                f"generators.count, learners.count or their {name.lower()}, or add nodes"
            )
    for actors in plan_actors(config):
        if not any(node.cpus >= actors.cpus and node.gpus >= actors.gpus for node in nodes):
            raise UserError(
                f"no node has {actors.cpus:g} CPUs and {actors.gpus:g} GPUs for one {actors.role}; the largest have "
                f"{max(node.cpus for node in nodes):g} CPUs and {max(node.gpus for node in nodes):g} GPUs"
            )
