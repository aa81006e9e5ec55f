"""Find an actor of a run, and strike it in a chosen phase of its work.

The actor is found through Ray's actor table. Its phase is read from outside: the process is frozen, its stacks are read
(py-spy comes with Ray's dashboard), and the process goes on unless it is where it is wanted. So the phase of a fault
is a fact and no guess about timing.
"""

import json
import re
import subprocess
import time
from dataclasses import dataclass

import psutil

from tests.faults.launched import Launch
from tests.integration.conftest import BIN, is_alive

# What an actor's stacks look like in a phase: our functions of each thread from the outermost on, a line a thread.
TAKING_PROMPTS = r"Generator\._submit"
GENERATING = r"EngineThread\._step"
LOADING_WEIGHTS = r"EngineThread\._serve .*Generator\.update_weights"
IDLE_ENGINE = r"\A(Exporter\._go_on\n)?EngineThread\._serve\Z"
BACKWARD = r"Learner\._backward > _engine_run_backward"
UPDATING = r"Learner\.update"
ANY = ""
SOON = 120.0  # seconds in which an actor comes to any phase of a step
INTERESTING = ("_engine_run_backward",)  # of other packages


@dataclass(frozen=True)
class Victim:
    """An actor that is frozen. `phase`: its stacks at that moment."""

    name: str
    process: psutil.Process
    phase: str

    def kill(self) -> None:
        """Kill it, and see that it is gone."""
        self.process.kill()
        deadline = time.monotonic() + 10
        while is_alive(self.process.pid):
            assert time.monotonic() < deadline, "the victim lives on"
            time.sleep(0.01)


def freeze(launch: Launch, name: str, phase: str = ANY) -> Victim:
    """Freeze the actor whose name begins with `name` as soon as its stacks match the pattern `phase`."""
    actor, pid = living(launch, name)
    process, deadline = psutil.Process(pid), time.monotonic() + SOON
    while True:
        assert launch.process.poll() is None, f"the run ended before {actor} came to {phase}"
        process.suspend()
        stacks = stacks_of(pid)
        if stacks is not None and re.search(phase, stacks):
            print(f"{actor} ({pid}) is struck in\n{stacks}")  # -rP shows it
            return Victim(actor, process, stacks.replace("\n", "; "))
        process.resume()
        assert time.monotonic() < deadline, f"{actor} never came to {phase}, last in\n{stacks}"
        time.sleep(0.01)


def living(launch: Launch, name: str) -> tuple[str, int]:
    """The first living actor whose name begins with `name`, and its process id."""
    deadline = time.monotonic() + SOON
    while True:
        for actor, pid in sorted(launch.actors().items()):
            if actor.startswith(name):
                return actor, pid
        assert time.monotonic() < deadline, f"no living {name}"
        time.sleep(0.1)


def stacks_of(pid: int) -> str | None:
    """Our functions on the stacks of a process, a line a thread; None if they cannot be read, as at its end."""
    words = [BIN / "py-spy", "dump", "--pid", str(pid), "--nonblocking", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"py-spy: {done.stderr.strip()}")
        return None
    threads = json.loads(done.stdout)
    lines = []
    for thread in threads:
        names = [
            frame["name"]
            for frame in reversed(thread["frames"])
            if "/rft_cluster/" in frame["filename"] or frame["name"] in INTERESTING
        ]
        lines += [" > ".join(names)] if names else []
    return "\n".join(lines)
