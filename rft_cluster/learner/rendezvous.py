"""Let learners on several hosts find each other, and name the host that cannot be reached.

    rank 0   store = open_store(address)                     a free port; Ray tells the others
    others   store = reach_store("tcp://HOST:PORT", ...)
    all      with connections(store, ...):                   each rank has reached every other rank
                 init_process_group(store=store, ...)        gloo and NCCL open ports of their own, too

Without these checks gloo waits for a filtered port until the deadline of the whole group, and then names neither host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from rft_cluster.common.errors import UserError
from rft_cluster.common.network import REACH_TIMEOUT, address_on, listening, reach


def open_store(address: str) -> dist.TCPStore:
    """Rank 0's store, on a free port of this host."""
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=REACH_TIMEOUT))


def reach_store(rendezvous: str, rank: int, address: str) -> dist.TCPStore:
    """Connect to rank 0's store at `tcp://HOST:PORT`; `address` is this host's.

    Raises:
        UserError: the store does not answer in time; the message names both hosts.
    """
    host, _, port = rendezvous.removeprefix("tcp://").rpartition(":")
    try:
        # torch would retry a refused or filtered port until its own deadline, without naming it.
        reach(host, port, REACH_TIMEOUT)
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=REACH_TIMEOUT))
    except (OSError, dist.DistError) as error:
        raise UserError(_unreachable(f"learner {rank} on {address}", f"learner 0 at {host}:{port}", error)) from error


@contextmanager
def connections(store: dist.Store, rank: int, ranks: int, interface: str) -> Iterator[None]:
    """Connect to a port of every other rank on the group's interface, and listen within this context.

    Raises:
        UserError: a rank cannot be reached, or did not come; the message names both hosts.
    """
    address = address_on(interface)
    with listening(address, ranks) as port:
        store.set(f"listener {rank}", f"{address} {port}")
        for other in range(ranks):
            if other != rank:
                _reach(store, other, f"learner {rank} on {address} ({interface})")
        yield


def _reach(store: dist.Store, other: int, name: str) -> None:
    key = f"listener {other}"
    try:
        # Wait twice as long, so that a rank which cannot reach the store reports that first.
        store.wait([key], timedelta(seconds=2 * REACH_TIMEOUT))
    except dist.DistError as error:
        raise UserError(f"{name} waited {2 * REACH_TIMEOUT:g} s for learner {other}, which did not come") from error
    host, port = store.get(key).decode().split()
    try:
        reach(host, port, REACH_TIMEOUT)
    except OSError as error:
        raise UserError(_unreachable(name, f"learner {other} at {host}:{port}", error)) from error


def _unreachable(one: str, other: str, error: Exception) -> str:
    return (
        f"{one} cannot reach {other} within {REACH_TIMEOUT:g} s ({error}): the hosts of a cluster must reach each "
        "other on all ports"
    )
