"""The newest answers of a run, for the terminal. Text of the model and of the data is escaped."""

from itertools import zip_longest
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.table import Table
from rich.text import Text

from rft_cluster.common.text import printable
from rft_cluster.run.debug import chosen
from rft_cluster.run.history import History


class Earned(BaseModel):
    total: float | None = None
    parts: object = None


class Group(BaseModel):
    """What is shown of a row of `rollouts/`. Older versions did not record all of it."""

    example_id: str
    label: str
    completions: list[str]
    rewards: list[Earned] = []
    advantages: list[float | None] = []
    why: list[str] = []


def newest(history: History, images: int) -> tuple[int, list[Group]]:
    """The last recorded step with completions, and some of its groups: the same ones that debug mode would show.

    0 and none before the first step.
    """
    step = max(history.recorded, default=0)
    seed = history.config["run"]["seed"] if history.config else 0
    rows = chosen(history.rollouts(step), images, seed, step)
    return step, [group for row in rows if (group := _group(row))]


def _group(row: Any) -> Group | None:
    try:
        return Group.model_validate(row)
    except ValidationError:
        return None


def answer_table(groups: list[Group]) -> Table:
    """A line for each completion, below a line for its image."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True, min_width=6)  # reward
    table.add_column(justify="right", no_wrap=True, min_width=5)  # advantage
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for group in groups:
        about = Text(f"{printable(group.example_id)}  label '{printable(group.label)}'", style="bold")
        table.add_row("reward", "adv.", about, style="bold")
        for text, earned, advantage, why in _entries(group):
            reward = "" if not earned else "masked" if earned.total is None else f"{earned.total:.2f}"
            if earned and earned.total is not None and earned.parts == {}:
                reward = "target"  # of SFT
            better = "" if advantage is None else f"{advantage:+.2f}"
            style = "" if not advantage else "green" if advantage > 0 else "red"
            words = Text.assemble(printable(why), (f"  {printable(text)}", "dim"))
            table.add_row(reward, Text(better, style=style), words)
    return table


def _entries(group: Group) -> list[tuple[str, Earned | None, float | None, str]]:
    lists = (group.completions, group.rewards, group.advantages, group.why)
    entries = list(zip_longest(*lists))[: len(group.completions)]
    return [(text, earned, advantage, why or "") for text, earned, advantage, why in entries]
