"""The prompts of a step: those that are due, and further ones while few groups are live (`schedule.min_live`).

A group whose rewards are equal teaches nothing, so a step in which most are has a small and noisy gradient. DAPO (arXiv
2503.14476, section 3.2) samples further prompts until a batch is full of live groups. Here the groups that are not live
stay in the step, which counts them in the loss's means, and the number of rounds has a limit.
"""

from collections.abc import Callable, Iterator, Sequence

from rft_cluster.config import Config
from rft_cluster.config.training import ScheduleSection
from rft_cluster.messages import Prompt, Reward
from rft_cluster.prompts import draw_prompts
from rft_cluster.run.task import Task

FURTHER = 3  # rounds at most

Advantages = Sequence[Sequence[float | None]]


def prompts_of(config: Config, task: Task, step: int, further: int = 0) -> list[Prompt]:
    """The prompts that are due in a step, from 0, or those of one of its `further` rounds, from 1."""
    size, seed = config.schedule.prompts_per_step, config.run.seed
    examples = task.dataset.batch(seed, step, size, further)
    return draw_prompts(examples, task.question, "train", step, seed, first=further * size, options=task.options)


def further_rounds(config: Config, task: Task, step: int) -> Iterator[list[Prompt]]:
    """The prompts of each further round that a step may have."""
    return (prompts_of(config, task, step, further) for further in range(1, most_rounds(config.schedule)))


def most_rounds(schedule: ScheduleSection) -> int:
    """How many rounds of prompts a step may have, with the one that is due."""
    return 1 + FURTHER if schedule.min_live else 1


def wants_more(
    rewards: Sequence[Sequence[Reward]],
    advantages: Callable[[Sequence[Sequence[Reward]]], Advantages],
    schedule: ScheduleSection,
) -> bool:
    """Return True if a step with these rewards is to ask about further prompts."""
    size = schedule.prompts_per_step
    if len(rewards) >= most_rounds(schedule) * size:
        return False
    live = sum(any(own) for own in advantages(rewards))  # neither None nor 0
    return live < schedule.min_live * size
