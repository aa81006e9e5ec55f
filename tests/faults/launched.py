"""A run that a user's command has started, and all that is seen of it from outside."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rft_cluster.run.ledger import check_run
from tests.integration.conftest import is_alive
from tests.integration.head import actor_table

STEPS, PROMPTS = 12, 6
SHORT = [f"schedule.steps={STEPS}", "schedule.evaluate_every=5", "schedule.save_every=4",
         f"schedule.prompts_per_step={PROMPTS}",
         "optimizer.warmup_steps=2", "data.validation=20", "data.test=20", "schedule.stop_when_stuck=0",
         "schedule.keep_checkpoints=3"]  # fmt: skip
GONE = 40.0  # seconds until what a killed driver leaves is gone: Ray's agents take their time on a busy machine
KEPT = ("ray", "torchinductor_")  # in the temporary folder: Ray's sessions and torch's cache
WHOLE_RUN = 400.0  # seconds for a run on a busy machine; it takes 30 on two quiet cores
STARTED: list["Launch"] = []


@dataclass
class Launch:
    """A launch that is running; its output is in a file."""

    process: subprocess.Popen
    output: Path
    run: Path
    temporary: Path
    """The folder for temporary files of the driver and of Ray."""
    shared: frozenset[str]
    """The names in shared memory before the start."""
    family: set[psutil.Process] = field(default_factory=set)
    """Every process that was seen below the driver, the driver excluded."""
    token: Path = Path.home() / ".ray" / "auth_token"
    """Of the run's Ray."""

    def text(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[psutil.Process]:
        """All processes below the driver. They are remembered: a process that lost its parent is not found again."""
        with suppress(psutil.NoSuchProcess):  # the driver has ended
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return list(self.family)

    def until(self, condition: Callable[["Launch"], object], what: str, seconds: float = 300) -> None:
        """Wait, with a deadline, until the condition is met; the run must go on meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition(self):
            assert self.process.poll() is None, f"ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{self.text()}"
            time.sleep(0.01)

    def actors(self) -> dict[str, int]:
        """Name -> process id of every living actor of the run, by the actor table of its Ray; none without a Ray."""
        dashboard = re.findall(r"dashboard (http://\S+)", self.text())[-1]
        try:
            rows = actor_table(dashboard, self.token.read_text())
        except OSError:  # it ends, or starts again
            return {}
        # The table shows a dead one as alive for a while.
        return {row["name"]: row["pid"] for row in rows if row["state"] == "ALIVE" and is_alive(row["pid"])}

    def steps(self) -> int:
        """Number of the newest recorded step; 0 before the first."""
        file = self.run / "metrics.jsonl"
        found = re.findall(r'^\{"step": (\d+)', file.read_text(), re.MULTILINE) if file.exists() else []
        return int(found[-1]) if found else 0

    def ends(self, code: int, seconds: float = WHOLE_RUN) -> None:
        """Check that it ends in time, with this code, without a traceback, and leaves no process."""
        self.processes()
        assert self.process.wait(seconds) == code, self.text()
        assert "Traceback" not in self.text(), self.text()
        assert "***" not in self.text(), self.text()
        self.left_nothing()

    def left_nothing(self) -> None:
        """Check that no process, temporary file or shared memory of the run is left, and remove Ray's logs."""
        _, alive = psutil.wait_procs(self.family, timeout=GONE)
        assert not [process for process in alive if is_alive(process.pid)], alive
        deadline = time.monotonic() + GONE
        while files := [path for path in self.temporary.glob("*") if not path.name.startswith(KEPT)]:
            assert time.monotonic() < deadline, files
            time.sleep(0.1)
        numbers = {str(process.pid) for process in self.family}
        fresh = {*os.listdir("/dev/shm")} - self.shared
        shared = [name for name in fresh if numbers & set(re.findall(r"\d+", name))]
        assert not shared, shared
        shutil.rmtree(self.temporary, ignore_errors=True)

    def stop(self, number: signal.Signals) -> None:
        """Send the signal to the driver alone, and check that it ends as it should and leaves nothing."""
        self.processes()
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            assert self.process.wait(70) == -signal.SIGKILL
            return self.left_nothing()
        self.ends(128 + number, 70)
        assert self.text().splitlines()[-1].startswith("interrupted: ")
        assert self.text().count("interrupted: ") == 1

    def cure(self) -> list[str]:
        """The command that the last line names."""
        return shlex.split(self.text().splitlines()[-1].partition("go on with: ")[2])

    def kill_all(self) -> None:
        """End what a failed test has left, frozen actors included."""
        if self.process.poll() is None:
            self.processes()
            self.process.kill()
            self.process.wait()
        for process in self.family:
            with suppress(psutil.NoSuchProcess):  # it has ended, whoever bears its number now
                process.kill()


def command(folder: Path, name: str, model: str, *overrides: str) -> list[str]:
    return ["python", "-m", "rft_cluster.launch", "--config", "digits", f"run.folder={folder}", f"run.name={name}",
            f"model.path={model}", *SHORT, *overrides]  # fmt: skip


def start(
    words: list[str], run: Path, folder: Path | None = None, inside: Sequence[str] = (), **variables: str
) -> Launch:
    """Start a command in a process of its own.

    Args:
        folder: of the file for its output, by default that of the run.
        inside: the beginning of the command, if it is executed in namespaces of its own.
        variables: added to its environment.
    """
    output = (folder or run.parent) / f"{run.name}-{time.monotonic_ns()}.txt"
    temporary = Path(tempfile.mkdtemp(prefix="faults_", dir="/tmp"))  # short: Ray's sockets are there
    shared = frozenset(os.listdir("/dev/shm"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if not inside and "RAY_ADDRESS" not in variables:  # else a Ray runs already, with a folder of its own
        environment |= {"TMPDIR": str(temporary), "RAY_TMPDIR": str(temporary)}
    environment |= variables
    with output.open("w") as file:
        process = subprocess.Popen(
            [*inside, sys.executable, *words[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    STARTED.append(Launch(process, output, run, temporary, shared))
    return STARTED[-1]


def finish(words: list[str], run: Path) -> str:
    launch = start(words, run)
    launch.ends(0)
    return launch.text()


def shows(text: str) -> Callable[[Launch], bool]:
    return lambda launch: text in launch.text()


def is_there(name: str) -> Callable[[Launch], bool]:
    return lambda launch: (launch.run / name).exists()


def has_done(step: int) -> Callable[[Launch], bool]:
    return lambda launch: launch.steps() >= step


def trained(run: Path) -> bytes:
    """What must not depend on where the run was stopped."""
    return (run / "model" / "model.safetensors").read_bytes()


def journal(run: Path) -> dict[str, int]:
    """File name -> time of its writing, of each step in the journal. A step that is replayed is not written again."""
    return {file.name: file.stat().st_mtime_ns for file in (run / "journal").glob("step-*.jsonl")}


def written_again(before: dict[str, int], run: Path) -> list[str]:
    """The files of the journal that were written anew since `before`; a checkpoint makes older ones needless."""
    now = journal(run)
    return [name for name, written in before.items() if now.get(name, written) != written]


def check_records(run: Path, steps: int = STEPS) -> None:
    """Check that a finished run has every prompt exactly once as trained or as skipped, by its own records."""
    ledger = check_run(run)
    assert ledger.problems == ()
    assert (ledger.state, ledger.steps) == ("done", steps)
    assert sum(ledger.fates.values()) == steps * PROMPTS
