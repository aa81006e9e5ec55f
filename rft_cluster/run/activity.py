"""What a run is doing now: `activity.json`, for whoever watches the run's folder, from this machine or another.

    {"step": 12, "phase": "learn", "since": 1795724551.2, "now": 1795724553.0,
     "actors": {"generator": "idle", "reward": "idle", "learner-0": "update", "learner-1": "update"}}

The driver writes the file every second while it has actors. It waits for them most of the time, so a thread writes.
The file is removed at the end. The file of a driver that was killed, or is frozen, has an old `now`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rft_cluster.common.files import json_object, write_text

ACTIVITY_FILE = "activity.json"
EVERY = 1.0  # seconds
Doing = Callable[[], Mapping[str, str]]
"""Says what each actor is doing, by its name, for people."""


class Now(BaseModel):
    """The content of the file. Times are in seconds since 1970, by the driver's clock."""

    model_config = ConfigDict(allow_inf_nan=False)

    step: int
    phase: str
    """`generate`, `learn` or `transfer`, as in the seconds of a step (docs/metrics.md); `evaluate`; `other` between
    these, as for checkpoints; `start` before the first."""
    since: float
    """When the phase began."""
    now: float
    """When this was written."""
    actors: dict[str, str]


class Activity:
    """What the run of a folder is doing."""

    def __init__(self, run: Path) -> None:
        self._file = run / ACTIVITY_FILE
        self._ended = threading.Event()
        self.begin(0, "start")

    def begin(self, step: int, phase: str) -> None:
        """The run begins a phase of a step."""
        self._phase = step, phase, time.time()

    @contextmanager
    def reported(self, doing: Doing) -> Iterator[None]:
        """Write the file every second within this context, and remove it at the end."""
        thread = threading.Thread(target=self._report, args=(doing,), name="activity", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            with suppress(OSError):  # a disk that was set to read-only: how the run ended matters more
                self._file.unlink(missing_ok=True)

    def _report(self, doing: Doing) -> None:
        while not self._ended.wait(EVERY):
            step, phase, since = self._phase
            now = Now(step=step, phase=phase, since=since, now=time.time(), actors=dict(doing()))
            with suppress(OSError):  # a disk that is full; who watches sees an old file, and the run has its own checks
                write_text(self._file, now.model_dump_json())


def read_activity(run: Path) -> Now | None:
    """What the run is doing; None without a whole file."""
    file = run / ACTIVITY_FILE
    try:
        return Now.model_validate(json_object(file.read_bytes())) if file.is_file() else None
    except (OSError, ValidationError):  # it was removed meanwhile, or a stranger's
        return None
