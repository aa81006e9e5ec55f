"""Memory that runs out: Ray's object store is full, or Ray ends an actor because its host has too little left."""

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults.launched import Launch, command, has_done, start
from tests.faults.table import Row
from tests.faults.test_lost_actors import ends_as_if_undisturbed, survives
from tests.faults.victims import living
from tests.integration.conftest import is_alive

STORE = 100_000_000  # bytes
GIB = 2**30
OWN = 8 * GIB  # more than a run takes
BLOCK = 2**28
FILLED = 120.0  # seconds in which a store is full, on a busy machine


def control_store(launch: Launch) -> str:
    """The address of the Ray that the run has started."""
    for process in launch.processes():
        with suppress(psutil.Error):  # it has ended
            for word in process.cmdline():
                if found := re.match(r"--gcs-address=(\S+)", word):
                    return found[1]
    raise AssertionError("no process of Ray names the address")


@contextmanager
def filled_store(launch: Launch) -> Iterator[tuple[int, int]]:
    """Fill the run's object store within this context. Yields the bytes that are held, and those of the store."""
    words = [sys.executable, "-m", "tests.faults.hoard", control_store(launch)]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as hoard:
        try:
            assert select.select([hoard.stdout], [], [], FILLED)[0], f"the store is not full after {FILLED:g} s"
            held, store = map(int, hoard.stdout.readline().split())
            yield held, store
            hoard.communicate(timeout=FILLED)  # closes its input, at which it ends
        finally:
            hoard.kill()


@pytest.mark.timeout(600)
def test_a_full_object_store_costs_nothing(undisturbed, tmp_path, tiny_model):
    size = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE)}
    launch = start(command(tmp_path, "mine", tiny_model), tmp_path / "mine", **size)
    launch.until(has_done(3), "step 3")
    driver = psutil.Process(launch.process.pid)
    driver.suspend()  # or the run would be over before its store is full
    with filled_store(launch) as (held, store):
        assert held > store and store <= STORE
        driver.resume()
        done = launch.steps()
        launch.until(has_done(done + 2), "two steps with a full store")
    ends_as_if_undisturbed(launch, undisturbed)
    Row(20, "object store full", f"after step {done}", ledger=True, exact=True).write()


@pytest.mark.timeout(600)
def test_an_actor_that_ray_ends_for_memory_is_replaced(undisturbed, tmp_path, tiny_model):
    memory = psutil.virtual_memory()
    if memory.available < OWN + 2 * GIB:
        pytest.skip(f"{memory.available / GIB:.1f} GiB of memory are free, and the test fills {OWN / GIB:g}")
    most = {"RAY_memory_usage_threshold": str((memory.total - memory.available + OWN) / memory.total)}
    launch = start(command(tmp_path, "mine", tiny_model, "cluster.restarts=10"), tmp_path / "mine", **most)
    launch.until(has_done(5), "step 5")
    actors, ballast = launch.actors(), list[np.ndarray]()

    def strike() -> None:
        """Take memory until the first actor is gone, and give it back. The driver waits, or its run would be over."""
        driver, deadline = psutil.Process(launch.process.pid), time.monotonic() + 60
        driver.suspend()
        while all(is_alive(pid) for pid in actors.values()):
            assert time.monotonic() < deadline, "Ray has ended no actor"
            if psutil.virtual_memory().available > memory.available - OWN - GIB:
                ballast.append(np.ones(BLOCK, np.uint8))
            time.sleep(0.02)
        ballast.clear()
        driver.resume()

    found, lost, warning = survives(launch, strike)
    cause = r"was killed by Ray, because its host was low on memory: \d+\.\d of \d+\.\d GiB were used"
    assert re.search(cause, warning), warning
    ends_as_if_undisturbed(launch, undisturbed)
    Row(20, "an actor killed by Ray for memory", "after step 5", found, lost, ledger=True, exact=True).write()


@contextmanager
def container_with(pid: int, room: int) -> Iterator[None]:
    """Move a process into a control group of its own (version 1 or 2), which may hold `room` bytes more than it has."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = root / ("memory" if old else "") / f"rft_cluster_{pid}"
    try:
        group.mkdir()
        # The memory that it has stays with its former group.
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(room))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        yield
    finally:
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
        group.rmdir()


@pytest.mark.timeout(600)
def test_an_actor_that_the_kernel_kills_for_memory_is_replaced_and_its_memory_is_said(
    undisturbed, tmp_path, tiny_model
):
    launch = start(command(tmp_path, "mine", tiny_model), tmp_path / "mine")
    launch.until(has_done(3), "step 3")
    _, pid = living(launch, "learner-0")
    with ExitStack() as stack:
        found, lost, warning = survives(launch, lambda: stack.enter_context(container_with(pid, 2**20)))
    assert warning.startswith("learner-0"), warning
    assert re.search(r"was killed by the kernel: out of memory, 0\.\d of 0\.\d GiB", warning), warning
    ends_as_if_undisturbed(launch, undisturbed)
    Row(20, "an actor killed by the kernel for memory", "after step 3", found, lost, ledger=True, exact=True).write()
