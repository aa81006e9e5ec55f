"""Save a checkpoint again and again, each time killed before another call to the system.

    python -m tests.faults.crashing FOLDER

The driver's part is the real one, and so are the writers, of small files; here they are in its process. Prints an
object a crash: the call, and what a run that goes on finds. A process of its own: it forks, and the children are killed
by SIGKILL, so nothing can clean up.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from rft_cluster.classification.card import make_card
from rft_cluster.config import Config
from rft_cluster.run.checkpoints import latest_checkpoint
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.resume import find_start
from rft_cluster.run.saving import Keeper
from tests.unit.run.begun import DATASET, TASK, Writing, config

CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir", "scandir")
BEFORE, SAVED = 8, 12  # the steps of the newest checkpoint, and of the one that is written
SETTINGS = ("schedule.steps=20", "schedule.save_every=4", "optimizer.warmup_steps=0", "cluster.snapshot_every=0")


class LocalLearners:
    """Two ranks in this process. The journal is written as far as a step that is to be saved."""

    def checkpoint_bytes(self) -> int:
        return 1000

    def write_checkpoint(self, folder: Path, step: int) -> Writing:
        return Writing(folder, step)

    def news_of_leaving(self) -> str:
        return ""

    def take_snapshot(self, step: int) -> None:
        raise NotImplementedError("cluster.snapshot_every is 0")

    def export(self, folder: Path, files: Mapping[str, Any]) -> None:
        raise NotImplementedError("no step is evaluated")


def save(settings: Config, first: int, step: int) -> None:
    keeper = Keeper(settings, make_card(settings, DATASET, TASK.question, (784, 784)), LocalLearners(), first, None)
    with keeper.step(step):
        pass
    keeper.save_if_due()  # begins
    keeper.save_if_due()  # completes


def begin(folder: Path) -> Config:
    """A run with two checkpoints, and the journal of the steps since the older."""
    settings = config(folder, *SETTINGS)
    run = RunFolder(settings, TASK)
    save(settings, 0, BEFORE - 4)
    save(settings, BEFORE - 4, BEFORE)
    for step in range(BEFORE - 4, SAVED):
        run.journal.commit(step, [], [])
    return settings


def kill_before(call: int) -> None:
    """Kill this process before the call of that number, from 0, and tell its name."""
    left = call

    def see(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event == "c_call" and argument.__name__ in CALLS:
            if left == 0:
                os.write(2, f"{argument.__name__}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.setprofile(see)


def crash(settings: Config, call: int) -> bool:
    """Save in a child that is killed before its call of that number; False if it ended before."""
    child = os.fork()
    if not child:
        kill_before(call)
        save(settings, BEFORE, SAVED)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def go_on(settings: Config) -> Mapping[str, Any]:
    """What a run finds that goes on, and what is left when it has saved that step again."""
    start = find_start(settings, resume=True)
    run = RunFolder(settings, TASK, start.step)
    journal = sorted(file.name for file in (run.path / "journal").iterdir())
    left = [path.name for path in run.path.rglob("*") if path.suffix in (".tmp", ".old")]
    save(settings, start.step, SAVED)
    _, problems = latest_checkpoint(run.path)
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    notes = [note for note in start.notes if note.startswith("WARNING")]
    return {"step": start.step, "journal": journal, "left": left + notes + problems, "checkpoints": names}


def main(folder: Path) -> None:
    begin(folder / "whole")
    for call in range(10_000):
        again = folder / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(folder / "whole", again)
        settings = config(again, *SETTINGS)
        if not crash(settings, call):
            return
        print("found: " + json.dumps(go_on(settings)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
