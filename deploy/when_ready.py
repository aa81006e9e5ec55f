"""Wait until the Ray at RAY_ADDRESS has so many nodes, then become a command: python when_ready.py NODES COMMAND...

Else the first run on a cluster finds a part of its nodes only, and is refused as too large.
"""

import os
import signal
import sys
import time

import ray

PATIENCE = 600.0  # seconds
PART_LOST = 3  # exit code: nothing to correct, a scheduler may try again (see rft_cluster/common/errors.py)


def join(address: str, deadline: float) -> None:
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's own handler ends with another code than a signal's
            return
        except ConnectionError:  # the head is not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def main(nodes: int, command: list[str]) -> int:
    address, deadline = os.environ["RAY_ADDRESS"], time.monotonic() + PATIENCE
    try:
        join(address, deadline)
    except ConnectionError as error:
        print(f"error: no Ray at {address} within {PATIENCE:g} s: {error}", file=sys.stderr)
        return PART_LOST
    while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
        if time.monotonic() > deadline:
            print(f"error: {alive} of {nodes} nodes joined {address} within {PATIENCE:g} s", file=sys.stderr)
            return PART_LOST
        time.sleep(1)
    ray.shutdown()
    print(f"{alive} nodes have joined {address}", flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
