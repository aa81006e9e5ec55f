"""Checkpoints in a run's folder: where they are, which are whole, and when the next is due.

checkpoints/step-000050/   state.json, and the learners' shards (see learner/checkpoint.py)
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import check_format, json_object, recover
from rft_cluster.config import ScheduleSection

STATE_FILE = "state.json"
MOST_TIME = 0.02  # share of a run's time that saving by the clock may take


class State(BaseModel):
    """`state.json`, what is to be known of a checkpoint."""

    step: int = Field(ge=0)
    prompt_sha256: str
    optimizer_updates: int = 0
    tiny_model: str | None = None
    """The name in the cache of the small model that the run began from."""
    files: dict[str, int] = {}
    """Each other file's size in bytes: one that was cut has another."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: State


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def latest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run folder, and what is wrong with each newer one.

    Raises:
        UserError: there are some, but none is whole, or a newer version of the program wrote the newest.
    """
    problems: list[str] = []
    for folder in _newest_first(run):
        try:
            return Checkpoint(folder, read_state(folder)), problems
        except ValueError as error:
            problems.append(f"{folder}: {error}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"{run} has no checkpoint that is whole; bring one back, or remove {run / 'checkpoints'} to begin the run "
            f"again:\n{lines}"
        )
    return None, []


def read_state(folder: Path) -> State:
    """The state of a checkpoint that is whole.

    Raises:
        ValueError: it is not; says what is wrong.
        UserError: a newer version of the program wrote it.
    """
    file = folder / STATE_FILE
    try:
        values = json_object(file.read_bytes()) if file.is_file() or not file.exists() else None
        if values is None:
            raise ValueError(f"{STATE_FILE} is damaged")
        check_format(values, file)
        state = State.model_validate(values)
    except OSError as error:
        raise ValueError(f"{STATE_FILE} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ValueError(f"{STATE_FILE} is damaged") from error
    if folder.name != f"step-{state.step:06d}":
        raise ValueError(f"{STATE_FILE} is of step {state.step}")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    if not sizes:
        raise ValueError("its shards are missing")
    for name, size in (state.files or dict.fromkeys(sizes)).items():
        if name not in sizes:
            raise ValueError(f"{name} is missing")
        if sizes[name] != (_whole_size(folder / name) if size is None else size):
            raise ValueError(f"{name} is cut or damaged")
    return state


def _newest_first(run: Path) -> list[Path]:
    """Those that were given their name; `.tmp` is one that was not finished."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 6), reverse=True)


def _whole_size(file: Path) -> int:
    """What a safetensors file's head says of its size: 8 bytes, a JSON object of that length, the tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            return -1
        head = json_object(opened.read(length)) or {}
    try:
        ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
        return 8 + length + max(ends)
    except (ValueError, LookupError, TypeError):  # no tensors, or no such object
        return -1


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep`; called after a newer one is complete."""
    for path in _newest_first(run)[keep:]:
        shutil.rmtree(path)


def clear_unfinished(run: Path) -> None:
    """Remove what a process that died while saving left."""
    for path in _unfinished(run):
        recover(path.with_suffix(""))


def _unfinished(run: Path) -> Iterator[Path]:
    for folder in (run, run / "checkpoints"):
        for suffix in (".tmp", ".old"):
            yield from (path for path in folder.glob(f"*{suffix}") if path.is_dir())


def is_due(schedule: ScheduleSection, step: int, seconds: float, cost: float) -> bool:
    """Whether to save after `step` steps, `seconds` after the last time, which took `cost` seconds."""
    if step == schedule.steps:
        return True
    if schedule.save_every:
        return step % schedule.save_every == 0
    return seconds >= max(60 * schedule.save_minutes, cost / MOST_TIME)
