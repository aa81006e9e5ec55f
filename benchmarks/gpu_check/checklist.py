"""Run the checks of a tier one by one: a line and a record for each, so that a second call goes on where one stopped.

pass  attention: forward               0.0031  at most 0.015            2.1 s
fail  digests: GPU and CPU                  1  0 tensors differ         0.4 s   visual.merger.mlp.0.weight
skip  NCCL: 2 generators                       equal digests            0.0 s   needs 3 GPUs, finds 1
"""

import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, ParamSpec, TextIO, TypeVar

import psutil

from rft_cluster.common.files import json_object, write_json

Made = TypeVar("Made")
Given = ParamSpec("Given")
DEADLINE = (
    250.0  # seconds for one check: a hang is a result, too, and must be one within LIMIT of deploy/gpu_kit/step.sh
)


@dataclass(frozen=True)
class Bench:
    """Where and how large the checks run.

    `device`: "cuda" or "cpu". `size`: "true", the shapes of Qwen2-VL-2B, or "tiny", or the `model_type` of another
    family, tiny, too. `folder`: for models and other large files that checks share; it outlives a call.
    """

    device: str
    size: str
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What a check found, e.g. `Outcome(True, 61.3, "GiB", "learner 0")`. `note`: a few words for the line."""

    passed: bool
    figure: float
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One check.

    `limit`: the words for the figure's limit, e.g. "at most 75 GiB". `gpus`: how many it needs. `cpu_lacks`: why a CPU
    cannot run it, e.g. "sleep mode"; empty if it can.
    """

    name: str
    limit: str
    run: Callable[[Bench], Outcome]
    gpus: int = 1
    cpu_lacks: str = ""


@dataclass(frozen=True)
class Line:
    """The record of a check. `result`: "pass", "fail" or "skip"; a failed check without a figure ended in an error."""

    result: str
    figure: float | None
    unit: str
    limit: str
    seconds: float
    note: str

    def __str__(self) -> str:
        figure = "" if self.figure is None else f"{self.figure:.4g} {self.unit}".strip()
        return f"{figure:>16}  {self.limit:32} {self.seconds:6.1f} s   {self.note}".rstrip()


def run_tier(tier: str, bench: Bench, out: Path, about: dict[str, Any], again: bool) -> list[Line]:
    """Run a tier's checks in this process. Its output goes to the log, but for a line a check."""
    with open(out / f"{tier}.log", "a") as log:
        console = own_output(log)
        checks: tuple[Check, ...] = import_module(f"benchmarks.gpu_check.{tier}").CHECKS
        return run_checks(checks, bench, out / f"{tier}.json", about, again, console)


def own_output(log: TextIO) -> TextIO:
    """Send this process's output, and that of processes it starts, to the log. Returns the output as it was."""
    console = os.fdopen(os.dup(1), "w")
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    return console


def run_checks(
    checks: Sequence[Check], bench: Bench, file: Path, about: Mapping[str, Any], again: bool, console: TextIO
) -> list[Line]:
    """Run the checks that `file` has no record of, and return the lines of all.

    Args:
        file: the tier's JSON; written after each check.
        about: the machine and the code, "gpus" among it. Records of another machine or other code do not count.
        again: run all, whatever is recorded.
    """
    done = {} if again else recorded(file, about)
    for check in checks:
        line = done.get(check.name)
        if line is None:
            line = line_of(check, bench, len(about["gpus"]))
            done[check.name] = line
            write_json(file, {**about, "checks": {name: asdict(one) for name, one in done.items()}})
        print(f"{line.result:5} {check.name:46} {line}", file=console, flush=True)
    return [done[check.name] for check in checks]


def recorded(file: Path, about: Mapping[str, Any]) -> dict[str, Line]:
    """The checks that were run on the same machine with the same code. None are if the file is missing or damaged."""
    found = json_object(file.read_bytes()) if file.is_file() else None
    if found is None or any(found.get(key) != value for key, value in about.items()):
        return {}
    return {name: Line(**line) for name, line in found["checks"].items()}


def line_of(check: Check, bench: Bench, gpus: int) -> Line:
    if bench.device == "cuda" and gpus < check.gpus:
        return Line("skip", None, "", check.limit, 0.0, f"needs {check.gpus} GPUs, finds {gpus}")
    if bench.device == "cpu" and check.cpu_lacks:
        return Line("skip", None, "", check.limit, 0.0, f"a CPU lacks {check.cpu_lacks}")
    print(f"--- {check.name}", flush=True)
    started = time.monotonic()
    answer = answer_of(check, bench)
    seconds = time.monotonic() - started
    error = answer.exception()
    if error:
        traceback.print_exception(error)
        return Line("fail", None, "", check.limit, seconds, cause(error))
    found = answer.result()
    result = "pass" if found.passed else "fail"
    return Line(result, found.figure, found.unit, check.limit, seconds, found.note)


def answer_of(check: Check, bench: Bench, deadline: float = DEADLINE) -> "Future[Outcome]":
    """Run a check in a thread of its own. After the deadline the processes that it started are ended, and the next
    check is not kept waiting."""
    answer: Future[Outcome] = Future()

    def work() -> None:
        try:
            answer.set_result(check.run(bench))
        except BaseException as error:  # noqa: BLE001 - the caller prints it, and the next check goes on
            answer.set_exception(error)

    Thread(target=work, name=check.name, daemon=True).start()
    try:
        answer.exception(deadline)
        return answer
    except TooLate:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
                child.kill()
    late: Future[Outcome] = Future()
    late.set_exception(TimeoutError(f"no answer within {deadline:.0f} s"))
    return late


def once(make: Callable[Given, Made]) -> Callable[Given, Made]:
    """`make`, called once for each bench: later calls return the same, or raise the same error at once.

    For what the checks of a tier share, such as an engine or a run. Checks run one by one, so a call that finds the
    first one still at work follows a check that hangs. It raises TimeoutError: each check would wait for its deadline.
    """
    begun: dict[Any, Future[Made]] = {}

    def made(*given: Given.args, **named: Given.kwargs) -> Made:
        key = given, tuple(sorted(named.items()))
        if key in begun:
            if not begun[key].done():
                raise TimeoutError("an earlier check still waits for the same")
            return begun[key].result()
        answer: Future[Made] = Future()
        begun[key] = answer
        try:
            answer.set_result(make(*given, **named))
        except BaseException as error:  # noqa: BLE001 - every call raises it
            answer.set_exception(error)
        return answer.result()

    return made


def cause(error: BaseException) -> str:
    """An exception as one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
