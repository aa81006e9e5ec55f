"""End actors for good, frozen ones too.

`ray.kill` asks the process, and has it killed if there is no answer within 5 s. But some 20 s after a process was
frozen gRPC closes the connection to it, and Ray 2.60 takes that error for the answer: the process stays, and so does
its claim to the room in which its successor is to start. So a task on its node kills it as well.
"""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import ray
from ray._private.state import actors  # of Ray's public functions only those say it that ask the dashboard
from ray.actor import ActorHandle

from rft_cluster.cluster.tasks import on_node


def end(handles: Iterable[ActorHandle]) -> None:
    """End actors. Returns without waiting for it."""
    for handle in handles:
        actor = actors(handle._actor_id.hex())
        ray.kill(handle)
        if actor.get("Pid"):
            where = on_node(actor["Address"]["NodeID"], max_retries=0)
            KILL.options(**where).remote(actor["Pid"], actor["ActorClassName"])


def kill_process(pid: int, role: str) -> None:
    """Kill a process here, if it is still an actor of that class: Ray gives it such a title."""
    with suppress(OSError):  # it has ended
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::{role}".encode()):
            os.kill(pid, signal.SIGKILL)


KILL = ray.remote(kill_process)
