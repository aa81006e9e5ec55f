"""Debug mode: some completions of each step in the terminal, as `DEBUG_MODE=true` shows them in Visual-RFT.

    step 12: roses/a.jpg, label 'pink primrose'
      reward 1.00 (format 1, accuracy 0)  advantage -0.71  23 tokens  answered 'rose', label 'pink primrose'; format ok
        <think>It is pink.</think><answer>rose</answer>

All completions are in `rollouts/`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft_cluster.common.text import printable
from rft_cluster.data.dataset import seeded_generator

LONGEST = 400  # characters shown of a completion

Row = Mapping[str, Any]
"""See `rollouts.py`."""


def chosen(rows: Sequence[Row], count: int, seed: int, step: int) -> list[Row]:
    """`count` of a step's groups, or all if there are fewer; drawn from (seed, step), in the step's order."""
    drawn = seeded_generator(seed, "debug", step).permutation(len(rows))[:count]
    return [rows[index] for index in sorted(drawn)]


def debug_lines(step: int, rows: Sequence[Row], images: Path | None) -> Iterator[str]:
    """Lines about these groups. Text of the model and of the data is escaped.

    `images`: the folder below which the images' ids may be paths.
    """
    for row in rows:
        yield f"step {step}: {printable(_path(row['example_id'], images))}, label '{printable(row['label'])}'"
        for index, text in enumerate(row["completions"]):
            yield f"  {completion_line(row, index)}"
            yield f"    {cut(printable(text))}"


def completion_line(row: Row, index: int) -> str:
    """The figures of one completion, and why it got its reward."""
    reward, advantage, gap = row["rewards"][index], row["advantages"][index], row["logprob_gaps"][index]
    parts = ", ".join(f"{printable(name)} {value:g}" for name, value in reward["parts"].items())
    total = "masked" if reward["total"] is None else f"reward {reward['total']:.2f}"
    earned = f"{total} ({parts})" if parts or reward["total"] is None else "a target of SFT"
    words = [earned, "no advantage" if advantage is None else f"advantage {advantage:+.2f}"]
    words += [f"{row['tokens'][index]} tokens"] + ([] if gap is None else [f"log-prob gap {gap:.4f}"])
    return "  ".join([*words, printable(row["why"][index])])


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters; all are in rollouts/)"


def _path(example_id: str, images: Path | None) -> str:
    """The path of an image, if its id is one below `images`; else the id."""
    path = images / example_id if images and ".." not in Path(example_id).parts else None
    return str(path) if path and os.path.isfile(path) else example_id  # Path.is_file raises if the id is too long
