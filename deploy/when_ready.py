"""Wait until the Ray at RAY_ADDRESS has so many nodes, then become a command: python when_ready.py NODES COMMAND...

Else the first run on a cluster finds a part of its nodes only, and is refused as too large. RFT_RAY_PIDS: the processes
here that run Ray of these nodes. When one of them has ended, nobody need wait any longer.

SIGTERM ends the process at once by the signal itself, so a scheduler sees that it was stopped (143).
"""

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

PATIENCE = 600.0  # seconds
PART_LOST = 3  # exit code: nothing to correct, a scheduler may try again (see rft_cluster/common/errors.py)


def watch(pids: list[int], address: str) -> None:
    """End this process when one of these has ended, also while Ray waits for an answer of a head that is gone."""
    while True:
        for pid in pids:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                told = f"error: Ray of a node of {address} ended before all had joined (process {pid}): see its log\n"
                os.write(2, told.encode())
                os._exit(PART_LOST)
        time.sleep(1)


def pause(deadline: float, missing: str) -> None:
    """Wait a second. Raises ConnectionError, which says that `missing` is so, after the deadline."""
    if time.monotonic() > deadline:
        raise ConnectionError(f"{missing} within {PATIENCE:g} s")
    time.sleep(1)


def join(address: str, deadline: float) -> None:
    host, _, port = address.rpartition(":")
    while port.isdecimal():  # else the address is `auto`, of a head on this machine
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            break
        except OSError as error:
            pause(deadline, f"no Ray at {address} ({error})")
    # Ray's core reads this on import. Else it takes SIGTERM, and prints a stack trace.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    import ray

    while True:
        try:
            # Outside the main thread `ray.init` leaves SIGTERM alone. Its own handler would end this process with the
            # code 15, and not before an attempt to connect has ended, half a minute later.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(ray.init, address=address, log_to_driver=False, logging_level="error").result()
            return
        except ConnectionError as error:  # the port is open, and the head is not ready yet
            pause(deadline, f"no Ray at {address} ({error})")


def main(nodes: int, command: list[str]) -> int:
    address, deadline = os.environ["RAY_ADDRESS"], time.monotonic() + PATIENCE
    if pids := [int(pid) for pid in os.environ.get("RFT_RAY_PIDS", "").split()]:
        Thread(target=watch, args=(pids, address), daemon=True).start()
    try:
        join(address, deadline)
        import ray

        while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
            pause(deadline, f"{alive} of {nodes} nodes joined {address}")
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return PART_LOST
    ray.shutdown()
    print(f"{alive} nodes have joined {address}", flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
