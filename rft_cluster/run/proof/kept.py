"""The checks of what a run keeps: its steps' rows, evaluations, checkpoints, journal, models, and no leftovers."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rft_cluster.classification.card import CARD_FILE, Card
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import json_object
from rft_cluster.common.text import shown
from rft_cluster.config import Config
from rft_cluster.run.checkpoints import State, check_digests, checkpoint_folders, checkpoint_step, read_state
from rft_cluster.run.folder import FIGURES
from rft_cluster.run.proof.account import begun
from rft_cluster.run.resume import read_saved_config
from rft_cluster.run.saving import BEST, MODEL, exported

Rows = list[dict[str, Any]]
FORMER = re.compile(r"config-to-(\d{6,9})\.yaml", re.ASCII)
# Folders in which a run writes under temporary names.
WRITTEN_IN = ("", "checkpoints", "rollouts", "evaluations", "journal")


def read_lines(file: Path) -> tuple[Rows, list[str], bool]:
    """The rows of `metrics.jsonl` or `eval.jsonl`, what is wrong with its lines, and whether its last line is cut.

    A last line that is cut is what a process leaves that was killed while it wrote: a run that goes on drops it.
    """
    lines = file.read_bytes().splitlines() if file.is_file() else []
    rows = [json_object(line) for line in lines]
    whole = [row if row and type(row.get("step")) is int else None for row in rows]
    cut = bool(whole) and whole[-1] is None
    damaged = [number for number, row in enumerate(whole[: len(whole) - cut], 1) if row is None]
    return [row for row in whole if row], [f"{file.name}, line {number} is damaged" for number in damaged], cut


def spans_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of numbers that follow each other: 3, 4, 5, 9 -> (3, 5), (9, 9)."""
    spans: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans


def steps_are(first: int, last: int) -> str:
    """The beginning of a sentence about these steps."""
    return f"step {first} is" if first == last else f"steps {first} to {last} are"


def gaps(present: Iterable[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The runs of numbers from `first` to `last` that are not present."""
    inside = sorted({first - 1, last + 1, *(number for number in present if first <= number <= last)})
    return ((before + 1, after - 1) for before, after in pairwise(inside) if after > before + 1)


def step_problems(steps: Sequence[int], last: int) -> Iterator[str]:
    """Check that `steps`, as recorded, are 1, 2, ... in order, none twice and none beyond `schedule.steps`, `last`."""
    for missing in gaps(steps, 1, max(steps, default=0)):
        yield f"metrics.jsonl: {steps_are(*missing)} missing"
    yield from (f"metrics.jsonl: step {step} is there {n} times" for step, n in Counter(steps).items() if n > 1)
    yield from (
        f"metrics.jsonl: step {after} stands after step {before}" for before, after in pairwise(steps) if after < before
    )
    for beyond in spans_of(step for step in steps if step > last or step < 1):
        yield f"metrics.jsonl: {steps_are(*beyond)} not of this run: schedule.steps is {last}"


def evaluation_problems(rows: Rows, due: Iterable[tuple[int, str]], sizes: dict[str, int], last: int) -> Iterator[str]:
    """Check that each evaluation (step, split) that is `due` is recorded, and none twice. `sizes`: images of a split.

    Others may be there: the schedule may have been another one before a resume.
    """
    found: dict[tuple[int, str], Rows] = {}
    for row in rows:
        found.setdefault((row["step"], str(row.get("split"))), []).append(row)
    yield from (
        f"eval.jsonl: the {split} of step {step} is missing" for step, split in due if (step, split) not in found
    )
    for (step, split), own in found.items():
        where = f"eval.jsonl: the {shown(split)} of step {step}"
        # An older version's row has fewer figures: a run that goes on evaluates again, and leaves that row.
        complete = [row for row in own if row.keys() >= set(FIGURES)] or own
        if len(complete) > 1:
            yield f"{where} is there {len(complete)} times"
        if split not in sizes or not 0 <= step <= last:
            yield f"{where} is not of this run, which has {last} steps"
        elif complete[-1].get("n", sizes[split]) != sizes[split]:
            yield f"{where} is of {shown(str(complete[-1]['n']))[:20]} images, and the manifest has {sizes[split]}"


def read_former(run: Path) -> dict[int, Config]:
    """The configurations that a run had before it went on with another, by the last step of each, ascending.

    Raises:
        UserError: one cannot be read.
    """
    files = {int(found[1]): file for file in run.glob("config-to-*.yaml") if (found := FORMER.fullmatch(file.name))}
    return {step: read_saved_config(files[step]) for step in sorted(files)}


def due_evaluations(
    former: Mapping[int, Config], config: Config, sizes: dict[str, int], steps: Sequence[int], done: bool
) -> list[tuple[int, str]]:
    """The evaluations (step, split) that `train` has made when the steps after the last one have begun, or all.

    `former`: see `read_former`. What was due after the last step of one is decided by the next one.
    """
    due = [(0, "test")] if sizes["test"] and steps else []
    for step in sorted(set(steps)):
        if step == max(steps) and not done:  # its evaluation may still be missing
            continue
        schedule = next((one for end, one in former.items() if end > step), config).schedule
        every, is_last = schedule.evaluate_every, step == schedule.steps
        if sizes["validation"] and every and (step % every == 0 or is_last):
            due.append((step, "validation"))
        if sizes["test"] and is_last:
            due.append((step, "test"))
    return due


def read_checkpoints(run: Path) -> tuple[dict[int, State | None], list[str]]:
    """The checkpoints by step, ascending, None for a damaged one; and what is wrong with them."""
    states: dict[int, State | None] = {}
    problems = []
    for folder in reversed(checkpoint_folders(run)):
        step = checkpoint_step(folder)
        try:
            state = read_state(folder)
            check_digests(folder, state.digests)
            states[step] = state
        except (ValueError, UserError, OSError) as error:
            if folder.exists():  # else a newer one has displaced it meanwhile
                states[step] = None
                problems.append(f"checkpoints/{folder.name}: {shown(str(error))}")
    return states, problems


def checkpoint_problems(states: dict[int, State | None], metrics: Rows, cut: bool, updates: int) -> Iterator[str]:
    """Check that each checkpoint is of a recorded step, and has seen the updates of the steps up to it, each once.

    `cut`: whether the last line of `metrics.jsonl` is cut. `updates`: optimizer updates of a step that are to be made.
    """
    where = f"metrics.jsonl{', whose last line is cut' if cut else ''}"
    recorded = {row["step"]: row for row in metrics}
    for step, state in states.items():
        if step and step not in recorded:
            yield f"checkpoints/step-{step:06d}: step {step} is not recorded in {where}"
        elif state and state.digests:  # an older version's may lack the number
            own = [row for number, row in recorded.items() if number <= step]
            made = sum(_updates(row, updates) for row in own)
            if len(own) == step and state.optimizer_updates != made:  # else a record is missing
                yield (
                    f"checkpoints/step-{step:06d}: the optimizer has made {state.optimizer_updates} updates, and the "
                    f"records of its steps have {made}"
                )


def _updates(row: dict[str, Any], updates: int) -> int:
    """The optimizer updates that a step made: none without a live group, and none whose gradient was not finite."""
    skipped = row.get("skipped")
    return begun(row, updates) - (skipped if type(skipped) is int else 0) if "learning_rate" in row else 0


def coverage_problems(journal: Iterable[int], oldest: int, last: int, ahead: int) -> Iterator[str]:
    """Check that the journal has every step from the `oldest` checkpoint to the `last` recorded step, without a gap.

    It may have more, up to `ahead`, without a gap.
    """
    steps = sorted(journal)
    for missing in gaps(steps, oldest + 1, max([last, *(step for step in steps if step <= ahead)])):
        yield f"journal: {steps_are(*missing)} missing, and the oldest checkpoint is of step {oldest}"
    for beyond in spans_of(step for step in steps if step > ahead):
        yield f"journal: {steps_are(*beyond)} there, and the last recorded step is {last}"


def read_models(run: Path) -> tuple[dict[str, Card], list[str]]:
    """The cards of the exported models by folder, and what is wrong with them."""
    cards: dict[str, Card] = {}
    problems: list[str] = []
    for name in (MODEL, BEST):
        try:
            if card := exported(run / name):
                cards[name] = card
            elif (run / name).exists():
                problems.append(f"{name}/ has no {CARD_FILE}: it is not whole")
        except UserError as error:
            problems.append(shown(str(error).replace("\n", "; ")))
    return cards, problems


def leftovers(run: Path) -> Iterator[str]:
    """Names that only a process has which is writing."""
    for folder in WRITTEN_IN:
        for path in sorted((run / folder).glob("*")):
            if path.suffix in (".tmp", ".old"):
                yield f"{shown(str(path.relative_to(run)))} is left of a process that died while it wrote"


def read_redone(run: Path) -> tuple[list[int], int, list[str]]:
    """The steps that were done again, how many of them have equal completions now, and what is wrong with records."""
    redone: list[int] = []
    replayed, problems = 0, []
    for folder in sorted(run.glob("redone-*")):
        rows, damaged, _ = read_lines(folder / "metrics.jsonl")
        problems += [f"{shown(folder.name)}/{problem}" for problem in damaged]
        for step in (row["step"] for row in rows):
            redone.append(step)
            before, now = (where / "rollouts" / f"step-{step:06d}.jsonl" for where in (folder, run))
            replayed += before.is_file() and now.is_file() and _completions(before) == _completions(now)
    return sorted(redone), replayed, problems


def _completions(file: Path) -> list[tuple[Any, ...]]:
    """The completions in a file of `rollouts/`, and who wrote them. The rest of a row may differ: other ranks sum a
    log-prob gap in another order, and older versions did not record it."""
    rows = [json_object(line) or {} for line in file.read_bytes().splitlines()]
    return [tuple(row.get(key) for key in ("prompt_id", "completions", "version_spans")) for row in rows]
