"""How fast this machine multiplies and copies, for estimates of runs on CPUs."""

import os
import time
from collections.abc import Callable

import torch

SIDE, COPY, REPEATS = 1024, 2**26, 7  # of square matrices; bytes that are copied; the fastest of so many counts


def measured_rates(dtype: str) -> tuple[float, float]:
    """FLOPs a second of matrix products in `dtype`, and bytes a second of copies, on all cores.

    One thread is measured, in its own processor time, so other programs on the machine do not count.
    """
    matrix = torch.ones(SIDE, SIDE, dtype=getattr(torch, dtype))
    memory = torch.ones(COPY, dtype=torch.uint8)
    target = torch.empty_like(memory)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    torch.set_num_threads(1)
    products, copies = _fastest(lambda: matrix @ matrix), _fastest(lambda: target.copy_(memory))
    torch.set_num_threads(threads)
    return cores * 2 * SIDE**3 / products, cores * 2 * COPY / copies


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(REPEATS):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return min(seconds)
