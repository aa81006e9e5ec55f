"""Ranks as threads that meet over loopback; hosts and firewalls are in the integration tests."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psutil
import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.learner import rendezvous
from rft_cluster.learner.rendezvous import connections, open_store, reach_store


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(rendezvous, "REACH_TIMEOUT", 0.5)


def test_a_port_that_refuses_is_named_at_once():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"learner 1 on 10\.0\.0\.2 cannot reach learner 0 at 127\.0\.0\.1:9 .*refused"):
        reach_store("tcp://127.0.0.1:9", 1, "10.0.0.2")
    assert time.monotonic() - start < 0.4


def test_three_ranks_reach_each_other():
    server = open_store("127.0.0.1")
    inside = Barrier(3)

    def meet(rank: int) -> int:
        store = reach_store(f"tcp://127.0.0.1:{server.port}", rank, "127.0.0.1") if rank else server
        with connections(store, rank, 3, "lo"):
            return inside.wait(timeout=10)  # passes when all three are in

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(meet, range(3))) == [0, 1, 2]


def test_nothing_listens_after_the_meeting():
    store = open_store("127.0.0.1")
    with connections(store, 0, 1, "lo"):
        port = int(store.get("listener 0").decode().split()[1])
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    listening = {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert port not in listening
    assert store.port in listening


def test_a_rank_behind_a_closed_port_is_named():
    store = open_store("127.0.0.1")
    store.set("listener 1", "127.0.0.1 9")
    message = (
        r"learner 0 on 127\.0\.0\.1 \(lo\) cannot reach learner 1 at 127\.0\.0\.1:9 within 0\.5 s "
        r"\(.*refused\): the hosts of a cluster must reach each other on all ports"
    )
    with pytest.raises(UserError, match=message), connections(store, 0, 2, "lo"):
        pass


def test_a_rank_that_does_not_come_is_named():
    store = open_store("127.0.0.1")
    waited = r"learner 0 on 127\.0\.0\.1 \(lo\) waited 1 s for learner 1, which did not come"
    with pytest.raises(UserError, match=waited), connections(store, 0, 2, "lo"):
        pass
