"""Compare programs that all run at once, each working only in its turn.

    step 0:  service | plain script | TRL        step 1:  TRL | plain script | service        ...

The service is the real training loop, in this process, with the real actors. The others are processes of their own that
wait on a pipe. Other load on the machine affects all of them alike; a round, one turn of each, is a repeat. The loop
asks its data set for a batch when a step begins. The others get their turn there, so the loop itself is unchanged, and
a step's time is the time between two such calls.
"""

import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from benchmarks.common import FOREIGN_LIMIT, ROOT, SPAWN, Usage, changed_environment, spread
from rft_cluster.classification.report import Evaluation
from rft_cluster.cluster.start import start_cluster
from rft_cluster.common.hardware import openmp_environment
from rft_cluster.config import Config
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.messages import Example, Group
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.task import Task, tiny_model_of
from rft_cluster.train import train

THREADS = 2
REPEATS = 5
START_TIMEOUT = 300.0
SERVICE = "service"


class Arm:
    """A process that works on demand. A function `package.module:name` runs in it with a connection and `arguments`: it
    sends None when it is ready, then answers each number of a step with a dict: `seconds`, and what else it says."""

    def __init__(self, function: str, *arguments: Any) -> None:
        self._connection, theirs = SPAWN.Pipe()
        # The same OpenMP runtime and number of threads as the service's actors have; nothing is fetched.
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        with changed_environment({**openmp_environment("cpu"), **own}):
            process = SPAWN.Process(target=_run, args=(function, theirs, *arguments), daemon=True)
            process.start()
        theirs.close()
        assert process.pid is not None
        self.pid = process.pid

    def wait_until_ready(self) -> None:
        if not self._connection.poll(START_TIMEOUT):
            raise RuntimeError(f"a program to compare with was not ready within {START_TIMEOUT:g} s")
        self._connection.recv()

    def turn(self, step: Any) -> dict[str, Any]:
        self._connection.send(step)
        return self._connection.recv()


def _run(function: str, connection: Connection, *arguments: Any) -> None:
    """Imports it here: what a program needs is not to weigh on the process of another."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(connection, *arguments)


class Enough(Exception):
    """All rounds are over: ends the training loop."""


@dataclass
class Turn:
    """`foreign`: the share of the machine that other programs took. `idle`: processor seconds of our programs that
    waited, Ray's own among them. `said`: what the program itself reports."""

    seconds: float
    foreign: float
    idle: float
    said: dict[str, Any] = field(default_factory=dict)


class Rounds:
    """Lets the programs take their turns: `warm` rounds that do not count, then `count` rounds."""

    def __init__(self, others: dict[str, Arm], count: int, warm: int) -> None:
        self._others, self._count, self._warm = others, count, warm
        self._usage = Usage()
        self._began: float | None = None
        self._off_the_clock = 0.0
        self.rounds: list[dict[str, Turn]] = [{} for _ in range(warm + count)]

    @property
    def counted(self) -> list[dict[str, Turn]]:
        return [turns for turns in self.rounds[self._warm :] if len(turns) == len(self._others) + 1]

    def step_begins(self, step: int) -> None:
        """The service's last step is over, and its next one waits until the others have had theirs.

        Raises:
            Enough: there is no next one.
        """
        if self._began is not None:
            seconds = time.perf_counter() - self._began - self._off_the_clock
            others = {arm.pid for arm in self._others.values()}
            self._note(step - 1, SERVICE, seconds, lambda pid: pid not in others, {})
        if step == len(self.rounds):
            raise Enough
        names = list(self._others) if step % 2 == 0 else list(self._others)[::-1]
        for name in names:
            arm = self._others[name]
            self._usage.since_last()
            said = arm.turn(step)
            self._note(step, name, said.pop("seconds"), arm.pid.__eq__, said)
        self.start_the_clock()

    def start_the_clock(self) -> None:
        """The service's step counts from now on."""
        self._usage.since_last()
        self._off_the_clock = 0.0
        self._began = time.perf_counter()

    def _note(self, step: int, name: str, seconds: float, at_work: Callable[[int], bool], said: dict[str, Any]) -> None:
        own, foreign = self._usage.since_last()
        idle = sum(used for pid, used in own.items() if not at_work(pid))
        self.rounds[step][name] = Turn(seconds, foreign, idle, said)
        print(f"round {step} {name}: {seconds:.2f} s, others {100 * foreign:.0f} %", file=sys.stderr, flush=True)

    def take_off(self, seconds: float) -> None:
        """`seconds` that passed since the step began are not the service's."""
        self._off_the_clock += seconds


class UntimedEvaluations(RunFolder):
    """An evaluation, from the look for one on record to its own record, counts in no step's time."""

    def __init__(self, config: Config, task: Task, model_path: str, rounds: Rounds) -> None:
        super().__init__(config, task, tiny_model=tiny_model_of(config, model_path))
        self._rounds, self._began = rounds, 0.0

    def evaluation(self, step: int, split: str) -> Evaluation | None:
        self._began = time.perf_counter()
        return super().evaluation(step, split)

    def log_evaluation(self, evaluation: Evaluation, groups: Sequence[Group]) -> None:
        super().log_evaluation(evaluation, groups)
        self._rounds.take_off(time.perf_counter() - self._began)


@dataclass(frozen=True, slots=True)
class TurnTaking(FewShotDataset):
    """A data set that says when a step begins."""

    step_begins: Callable[[int], None] = lambda step: None

    def batch(self, seed: int, step: int, size: int, further: int = 0) -> list[Example]:
        self.step_begins(step)
        return FewShotDataset.batch(self, seed, step, size, further)


def run_rounds(config: Config, task: Task, model_path: str, others: dict[str, Arm], count: int, warm: int) -> Rounds:
    """Train with the service while the others take their turns, until all rounds are over."""
    rounds = Rounds(others, count, warm)
    parts = {one.name: getattr(task.dataset, one.name) for one in fields(FewShotDataset)}
    in_turns = Task(TurnTaking(**parts, step_begins=rounds.step_begins), task.question)
    for arm in others.values():
        arm.wait_until_ready()
    with start_cluster(config, model_path, task.dataset.images) as cluster:
        try:
            train(config, in_turns, cluster, UntimedEvaluations(config, in_turns, model_path, rounds))
        except Enough:
            return rounds
    raise RuntimeError(f"training ended before {warm + count} rounds: schedule.steps is {config.schedule.steps}")


def pairs(rounds: Sequence[Mapping[str, Turn]], first: str, second: str) -> tuple[list[tuple[Turn, Turn]], bool]:
    """The turns of two programs in the same round; true if none of them was disturbed.

    Rounds in which either was disturbed are left out, unless fewer than `REPEATS` would remain: then all are in.
    """
    found = [(turns[first], turns[second]) for turns in rounds if first in turns]
    calm = [pair for pair in found if max(turn.foreign for turn in pair) <= FOREIGN_LIMIT]
    return (calm, True) if len(calm) >= REPEATS else (found, False)


def comparison(rounds: Sequence[Mapping[str, Turn]], first: str, second: str) -> dict[str, Any]:
    """Seconds of both in the rounds that count, and first / second; what they said of their parts."""
    chosen, undisturbed = pairs(rounds, first, second)
    sides = dict(zip((first, second), zip(*chosen, strict=True), strict=True))
    return {
        "ratio": spread([one.seconds / other.seconds for one, other in chosen]),
        "seconds": {name: spread([turn.seconds for turn in turns]) for name, turns in sides.items()},
        "parts": {
            name: {
                part: median(turn.said[part] for turn in turns if part in turn.said)
                for part in dict.fromkeys(part for turn in turns for part in turn.said)
            }
            for name, turns in sides.items()
        },
        "idle_processors": {name: median(turn.idle / turn.seconds for turn in turns) for name, turns in sides.items()},
        "undisturbed": undisturbed,
        "foreign": median(turn.foreign for pair in chosen for turn in pair),
    }


def serve_steps(connection: Connection, step: Callable[[int], dict[str, Any]]) -> None:
    """The loop of an arm: `step` does a step's work, timing what is to be timed."""
    connection.send(None)
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        connection.send(step(number))
