"""Checkpoints in a run's folder: find the newest complete one, remove old ones, decide when the next is due.

checkpoints/step-000050/   state.json, and the learners' shards (see learner/checkpoint.py)
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, Field, ValidationError

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import (
    FORMAT,
    check_format,
    check_seal,
    file_sha256,
    json_object,
    recover,
    sealed,
    size,
    unfinished,
    write_json,
)
from rft_cluster.common.text import shown
from rft_cluster.config import ScheduleSection
from rft_cluster.messages import WrittenFile
from rft_cluster.run.journal import has_all_steps

STATE_FILE = "state.json"
MOST_TIME = 0.02  # largest share of a run's time for saving every `schedule.save_minutes`


class State(BaseModel):
    """The content of `state.json`."""

    step: int = Field(ge=0)
    prompt_sha256: str
    optimizer_updates: int = 0
    tiny_model: str | None = None
    """Cache name of the tiny model that the run started from, if any."""
    files: dict[str, int] = {}
    """Size in bytes of every other file, to detect truncated ones."""
    digests: dict[str, str] = {}
    """SHA-256 of each file, to detect changed ones. Checkpoints of older versions have none."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: State


class Writing(Protocol):
    """The learners' files while they are written; see `cluster.snapshots.Writing`."""

    @property
    def done(self) -> bool: ...

    def wait(self, seconds: float | None = None) -> list[WrittenFile]: ...


class NewCheckpoint:
    """A checkpoint that is written while the run goes on, in a temporary folder until `finish` has renamed it."""

    def __init__(self, run: Path, state: State, write: Callable[[Path, int], Writing]) -> None:
        """`write` begins to write the files of a step to a folder."""
        self.step, self.path, self._state = state.step, checkpoint_folder(run, state.step), state
        with ExitStack() as stack:
            self._temporary = stack.enter_context(unfinished(self.path))
            self._writing = write(self._temporary, state.step)
            self._rest = stack.pop_all()

    @property
    def done(self) -> bool:
        """True if `finish` would not wait for the files."""
        return self._writing.done

    def finish(self, seconds: float | None = None) -> float:
        """Wait for the files, by `seconds` at most, and make the checkpoint a whole one. Returns the seconds that its
        files took.

        Raises:
            DiskFull: there was no room.
            OSError, ClusterError: the files are not complete. Nothing is left of them.
        """
        with self._rest:
            files = self._writing.wait(seconds)
            state = self._state.model_copy(
                update={
                    "optimizer_updates": files[0].updates,
                    "files": {file.name: file.bytes for file in files},
                    "digests": {file.name: file.sha256 for file in files},
                }
            )
            write_json(self._temporary / STATE_FILE, sealed({"format": FORMAT, **state.model_dump()}))
        return max(file.seconds for file in files)


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def latest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a run folder, and a note on each newer, damaged one.

    None without checkpoints, and if the journal has all steps: then no other than the first was ever whole.

    Raises:
        UserError: all checkpoints are damaged, or a newer version of the program wrote the newest.
    """
    problems: list[str] = []
    for folder in checkpoint_folders(run):
        try:
            state = read_state(folder)
            check_digests(folder, state.digests)
            return Checkpoint(folder, state), problems
        except ValueError as error:
            problems.append(f"{folder}: {error}")
    if problems and not has_all_steps(run):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"{run} has no complete checkpoint; bring one back, or remove {run / 'checkpoints'} to begin the run "
            f"again:\n{lines}"
        )
    return None, problems


def read_state(folder: Path) -> State:
    """Read the state of a checkpoint and check that all its files have their sizes.

    Raises:
        ValueError: the checkpoint is damaged; the message says how.
        UserError: a newer version of the program wrote it.
    """
    file = folder / STATE_FILE
    try:
        values = json_object(file.read_bytes()) if file.is_file() or not file.exists() else None
        if values is None:
            raise ValueError(f"{STATE_FILE} is damaged")
        if not check_seal(values):  # before the format: that may be what has changed
            raise ValueError(f"{STATE_FILE} is damaged: it has changed since it was written")
        check_format(values, file)
        state = State.model_validate(values)
    except OSError as error:
        raise ValueError(f"{STATE_FILE} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ValueError(f"{STATE_FILE} is damaged") from error
    _check_sizes(folder, state)
    return state


def _check_sizes(folder: Path, state: State) -> None:
    if folder.name != f"step-{state.step:06d}":
        raise ValueError(f"{STATE_FILE} is of step {state.step}")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file()}
    if not sizes:
        raise ValueError("its shards are missing")
    if missing := state.digests.keys() - sizes.keys():  # also a name that leads out of the folder
        raise ValueError(f"{shown(min(missing))} is missing")
    for name, length in (state.files or dict.fromkeys(sizes)).items():
        if name not in sizes:
            raise ValueError(f"{name} is missing")
        if sizes[name] != (_whole_size(folder / name) if length is None else length):
            raise ValueError(f"{name} is cut or damaged")


def check_digests(folder: Path, digests: dict[str, str]) -> None:
    """Read every file again: one changed bit of a weight can make a policy that answers nothing.

    Raises:
        ValueError: a file differs from its SHA-256 in `digests`; the message says which.
    """
    files = [folder / name for name in digests]
    total = sum(file.stat().st_size for file in files)
    if total > 4 * 10**9:
        print(f"checking the {size(total)} of {folder} against their checksums", flush=True)
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock: as fast as the disk or the processors
        try:
            found = list(threads.map(file_sha256, files))
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read ({error.strerror})") from error
    for file, digest in zip(files, found, strict=True):
        if digest != digests[file.name]:
            raise ValueError(f"{file.name} is damaged: its bytes have changed since they were written")


def seconds_since_saved(run: Path) -> float:
    """Age of the newest checkpoint; without any, of the run's manifest, which is written once."""
    newest = next((path for path in (*checkpoint_folders(run), run / "manifest.json") if path.exists()), None)
    return max(0.0, time.time() - newest.stat().st_mtime) if newest else 0.0


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint whose files have their sizes; None without any. Their bytes are not read."""
    for folder in checkpoint_folders(run):
        with suppress(ValueError, UserError):
            return read_state(folder).step
    return None


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoint folders, whole or not, newest first, without unfinished ones (`.tmp`)."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 6), reverse=True)


def _whole_size(file: Path) -> int:
    """The size of a safetensors file according to its header: 8 bytes, a JSON object of that length, the tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            return -1
        head = json_object(opened.read(length)) or {}
    try:
        ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
        return 8 + length + max(ends)
    except (ValueError, LookupError, TypeError):  # no tensors, or not such an object
        return -1


def prune_checkpoints(run: Path, newest: int, keep: int) -> int:
    """Remove all checkpoints but the last `keep` up to the step `newest`, whose own is complete.

    Newer ones are damaged: the run went on from one before them. Counted, they would displace those that are whole.
    Returns the step of the oldest that is left.
    """
    whole = [path for path in checkpoint_folders(run) if checkpoint_step(path) <= newest]
    for path in {*checkpoint_folders(run)} - {*whole[:keep]}:
        shutil.rmtree(path)
    return checkpoint_step(whole[:keep][-1])


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def clear_unfinished(run: Path) -> None:
    """Remove unfinished checkpoints of a process that died while saving."""
    for path in _unfinished(run):
        recover(path.with_suffix(""))


def _unfinished(run: Path) -> Iterator[Path]:
    for folder in (run, run / "checkpoints"):
        for suffix in (".tmp", ".old"):
            yield from (path for path in folder.glob(f"*{suffix}") if path.is_dir())


def is_due(schedule: ScheduleSection, step: int, seconds: float, cost: float) -> bool:
    """Return True if a checkpoint is due after `step` steps, `seconds` after the last one, which took `cost` s."""
    if step == schedule.steps:
        return True
    if schedule.save_every and step % schedule.save_every == 0:
        return True
    return seconds >= max(60 * schedule.save_minutes, cost / MOST_TIME)
