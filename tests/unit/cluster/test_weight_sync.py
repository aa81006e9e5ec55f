"""The order of a transfer, with learners and generators that write down what they are asked, in threads."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from rft_cluster.cluster.handles import ActorGroup
from rft_cluster.cluster.weight_sync import WeightSync, check_records
from rft_cluster.common.errors import ClusterError, UserError, WeightTransferError
from rft_cluster.messages import WeightRecord
from rft_cluster.weights.digests import added_up, combined_digest
from rft_cluster.weights.sender import WeightOffer
from tests.unit.cluster.local import LocalActor, local_actors

PARTS = [{"a": 1, "b": 5}, {"a": 2}]  # digests of what the two ranks sent
DIGEST = combined_digest({"a": 3, "b": 5})
OFFERS = {
    "shared_memory": WeightOffer({"nbytes": 8}, {"path": "memory"}, 8),
    "nccl": WeightOffer({"rank_offset": 1, "world_size": 3}, {"names": ["a", "b"]}, 8),
    "ipc": WeightOffer({"packed": True}, None, 8),
}


class Transfer:
    """Two learners and two generators; `events` are their calls, in order. NCCL's ends return together or never."""

    def __init__(self, transfer: str, threads: ThreadPoolExecutor) -> None:
        self.transfer = transfer
        self.events: list[str] = []
        self.verifying = threading.Event()  # no generator verifies before
        self.verifying.set()
        self.fails: dict[str, Exception] = {}  # by event
        self.records: list[WeightRecord] = []
        self.together = threading.Barrier(3)
        self.learners = [Learner(self, rank) for rank in (0, 1)]
        self.generators = [Generator(self, number) for number in (0, 1)]
        self.sync = WeightSync(
            ActorGroup({f"learner-{learner.rank}": LocalActor(learner, threads) for learner in self.learners}, 5),
            ActorGroup(
                {f"generator-{each.number}": LocalActor(each, threads) for each in self.generators}, 5, "weights"
            ),
            transfer,
            tensor_parallel=1,
        )

    def note(self, event: str) -> None:
        self.events.append(event)
        if event in self.fails:
            raise self.fails[event]

    def meet(self) -> None:
        if self.transfer == "nccl":
            self.together.wait(5)

    def connect(self, *hosts: str) -> "Transfer":
        names = ["learner-0", "learner-1", "generator-0", "generator-1"]
        self.sync.connect(dict(zip(names, hosts or ["here"] * 4, strict=True)))
        self.events.clear()
        return self

    def publish(self, version: int) -> list[set[str]]:
        """The events of an update, in groups that may come in any order, up to the verification."""
        self.events.clear()
        self.sync.publish(version)
        self.sync.wait()
        return steps(self.events)


def steps(events: list[str]) -> list[set[str]]:
    grouped: list[tuple[str, set[str]]] = []
    for event in events:
        kind = event.split("-")[0]
        if not grouped or grouped[-1][0] != kind:
            grouped.append((kind, set()))
        grouped[-1][1].add(event)
    return [names for _, names in grouped]


class Learner:
    def __init__(self, transfer: Transfer, rank: int) -> None:
        self._transfer, self.rank = transfer, rank
        self._forward: Any = None

    def offer_weights(self, generator_ranks: int) -> WeightOffer:
        assert generator_ranks == 2
        return OFFERS[self._transfer.transfer] if self.rank == 0 else WeightOffer({}, {}, 0)

    def connect_weights(self, forward: Any) -> None:
        self._forward = forward
        if self.rank == 0:
            self._transfer.meet()

    def publish_weights(self) -> None:
        self._transfer.note(f"publish-{self.rank}")
        if self.rank == 0:
            self._transfer.meet()
            for chunk in range(2) if self._forward else ():
                self._forward({"chunk": chunk})

    def weight_digests(self) -> dict[str, int]:
        return PARTS[self.rank]

    def weight_bytes(self) -> Any:
        self._transfer.note("bytes-0")
        return np.arange(8, dtype=np.uint8)


class Generator:
    def __init__(self, transfer: Transfer, number: int) -> None:
        self._transfer, self.number = transfer, number
        self.told: list[Any] = []

    def _note(self, event: str) -> None:
        self._transfer.note(f"{event}-{self.number}")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.told.append(init_info)
        self._transfer.meet()

    def load_weights(self, update_info: dict[str, Any], version: int, data: Any) -> None:
        self._note("load")
        self.told.append((update_info, version, data if data is None else data.tolist()))
        self._transfer.meet()

    def start_weight_update(self) -> None:
        self._note("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._note("update")
        self.told.append(update_info)

    def finish_weight_update(self, version: int) -> None:
        self._note("finish")
        self.told.append(version)

    def verify_weights(self, version: int, *digests: dict[str, int]) -> WeightRecord:
        assert self._transfer.verifying.wait(5)
        self._note("verify")
        record = WeightRecord(version, combined_digest(added_up(digests)), 222)
        return self._transfer.records[self.number] if self._transfer.records else record


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Transfer]]:
    with local_actors(monkeypatch) as threads:
        started: list[Transfer] = []

        def start(transfer: str) -> Transfer:
            started.append(Transfer(transfer, threads))
            return started[-1]

        yield start
        for transfer in started:
            transfer.together.abort()  # whoever hangs there goes


BOTH = {kind: {f"{kind}-0", f"{kind}-1"} for kind in ("publish", "load", "start", "update", "finish", "verify")}


def test_shared_memory_is_written_before_generators_load_it(start):
    transfer = start("shared_memory").connect()
    assert transfer.publish(3) == [BOTH["publish"], BOTH["load"], BOTH["verify"]]
    assert [generator.told for generator in transfer.generators] == [[{"nbytes": 8}, ({"path": "memory"}, 3, None)]] * 2
    assert transfer.sync.held == {"generator-0": 3, "generator-1": 3}


@pytest.mark.parametrize("kind", ["shared_memory", "nccl", "ipc"])
def test_updates_are_counted_with_their_seconds_and_the_bytes_of_each_copy(start, kind):
    sync = start(kind).connect().sync
    for version in (3, 4):
        sync.publish(version)
    assert (sync.updates, sync.bytes) == (2, 2 * 8 * 2)
    assert 0 < sync.seconds < 5


def test_only_generators_on_other_hosts_are_sent_the_bytes(start):
    """The others map the learners' memory, of which they get the path."""
    transfer = start("shared_memory").connect("here", "here", "here", "there")
    transfer.publish(3)
    here, there = (generator.told[-1] for generator in transfer.generators)
    assert here == ({"path": "memory"}, 3, None)
    assert there == ({"path": "memory"}, 3, [0, 1, 2, 3, 4, 5, 6, 7])


def test_after_a_restart_both_ends_meet_again_wherever_they_are(start):
    transfer = start("shared_memory").connect()
    transfer.publish(3)
    transfer.connect("here", "here", "there", "here")  # as Ray started generator-0 again, on another host
    transfer.publish(4)
    assert [generator.told[2:] for generator in transfer.generators] == [
        [{"nbytes": 8}, ({"path": "memory"}, 4, [0, 1, 2, 3, 4, 5, 6, 7])],
        [{"nbytes": 8}, ({"path": "memory"}, 4, None)],
    ]


@pytest.mark.parametrize("how", [{"lost": ["generator-0"]}, {"verified": False}])
def test_a_verification_that_died_with_a_generator_ends_with_its_replacement(start, how):
    transfer = start("shared_memory").connect()
    transfer.fails["verify-0"] = ClusterError("an actor died")
    transfer.sync.publish(3)
    with pytest.raises(ClusterError, match="an actor died"):
        transfer.sync.wait()
    del transfer.fails["verify-0"]
    transfer.sync.reconnect(**how)
    transfer.publish(4)
    assert transfer.sync.held == {"generator-0": 4, "generator-1": 4}


def test_the_survivors_verification_is_not_dropped_with_a_lost_generator(start):
    transfer = start("shared_memory").connect()
    transfer.fails = {f"verify-{number}": WeightTransferError(f"wrong-{number}") for number in (0, 1)}
    transfer.sync.publish(3)
    transfer.sync.verify()
    transfer.sync.reconnect(lost=["generator-0"])
    with pytest.raises(WeightTransferError, match="wrong-1"):
        transfer.sync.wait()


def test_nccl_s_ends_run_at_once(start):
    """Neither would return without the other: one after the other, they would wait for each other's time limit."""
    transfer = start("nccl").connect()
    assert [generator.told for generator in transfer.generators] == [
        [{"rank_offset": 1, "world_size": 3}],
        [{"rank_offset": 2, "world_size": 3}],
    ]
    assert set.union(*transfer.publish(3)) == BOTH["publish"] | BOTH["load"] | BOTH["verify"]
    assert transfer.events[-2:] == ["verify-0", "verify-1"] or transfer.events[-2:] == ["verify-1", "verify-0"]
    assert transfer.generators[1].told[-1] == ({"names": ["a", "b"]}, 3, None)


@pytest.mark.parametrize("kind", [WeightTransferError, OSError, UserError])  # UserError: it is out of memory
def test_a_generator_that_fails_to_load_is_lost(start, kind):
    """vLLM counts what it has loaded, and would take other layers' weights for what is sent again."""
    transfer = start("shared_memory").connect()
    transfer.fails["load-1"] = kind("layer 3")
    with pytest.raises(ClusterError, match=r"^generator-1 did not load weights: layer 3") as raised:
        transfer.sync.publish(3)
    assert raised.value.lost == {"generator-1"}


@pytest.mark.parametrize(
    ("call", "lost", "told"),
    [("bytes-0", "learner-0", "^learner-0 died while 'weight_bytes'"), ("load-1", "generator-1", "^generator-1 died")],
)
def test_whoever_dies_while_a_generator_loads_is_lost_and_not_who_waits_for_it(start, call, lost, told):
    transfer = start("shared_memory").connect("here", "here", "here", "there")
    transfer.fails[call] = ActorDiedError()
    with pytest.raises(ClusterError, match=told) as raised:
        transfer.sync.publish(3)
    assert raised.value.lost == {lost}


@pytest.mark.parametrize("event", ["load-1", "publish-0"])
def test_with_one_end_of_nccl_all_are_lost(start, event):
    """The others hang in the broadcast, and can be told nothing."""
    transfer = start("nccl").connect()
    transfer.fails[event] = ClusterError("an actor died", ["generator-1"])
    with pytest.raises(ClusterError, match="an actor died") as raised:
        transfer.sync.publish(3)
    assert raised.value.lost == {"learner-0", "learner-1", "generator-0", "generator-1"}


@pytest.mark.parametrize("event", ["load-1", "publish-0"])
def test_a_failure_at_one_end_of_nccl_is_raised_while_the_other_hangs(start, event):
    transfer = start("nccl").connect()
    transfer.fails[event] = ValueError("a bad request")
    with pytest.raises(ValueError, match="a bad request"):
        transfer.sync.publish(3)
    assert "verify-0" not in transfer.events


def test_what_vllm_s_ipc_sender_makes_while_it_sends_is_forwarded_between_start_and_finish(start):
    transfer = start("ipc").connect()
    assert transfer.publish(3) == [BOTH["start"], BOTH["publish"], BOTH["update"], BOTH["finish"], BOTH["verify"]]
    assert [generator.told for generator in transfer.generators] == [
        [{"packed": True}, {"chunk": 0}, {"chunk": 1}, 3],
    ] * 2


def test_the_memory_is_not_written_before_the_last_update_is_verified(start):
    transfer = start("shared_memory").connect()
    transfer.verifying.clear()
    transfer.sync.publish(3)  # returns without the verification: generators may work
    transfer.sync.verify()
    assert steps(transfer.events) == [BOTH["publish"], BOTH["load"]]
    assert transfer.sync.held == {}
    threading.Timer(0.05, transfer.verifying.set).start()
    transfer.sync.publish(4)
    assert steps(transfer.events)[:4] == [BOTH["publish"], BOTH["load"], BOTH["verify"], BOTH["publish"]]
    transfer.sync.wait()
    assert transfer.sync.held == {"generator-0": 4, "generator-1": 4}


@pytest.mark.parametrize("transfer", ["shared_memory", "nccl"])
def test_an_update_is_verified_once_and_not_before_it_is_asked_for(start, transfer, monkeypatch):
    """The calls would hold up the prompts that are dispatched next."""
    started, begun = start(transfer).connect(), []
    begin_all = started.sync._learners.begin_all
    monkeypatch.setattr(
        started.sync._learners, "begin_all", lambda method, *own: begun.append(method) or begin_all(method, *own)
    )
    assert started.sync.verify() == {}
    started.verifying.clear()
    started.sync.publish(3)
    assert "weight_digests" not in begun
    for _ in range(2):
        assert list(started.sync.verify().values()) == ["learner-0 (digests)", "learner-1 (digests)"]
    started.verifying.set()
    started.sync.wait()
    assert (begun.count("weight_digests"), started.events.count("verify-0")) == (1, 1)
    assert started.sync.verify() == {}


def test_an_update_that_failed_its_verification_stops_the_next_and_whoever_waits(start):
    transfer = start("shared_memory").connect()
    transfer.records = [WeightRecord(3, 1, 222)] * 2
    transfer.sync.publish(3)
    for _ in range(2):
        with pytest.raises(WeightTransferError, match="generator-0 received other weights for version 3"):
            transfer.sync.wait()
    with pytest.raises(WeightTransferError, match="generator-0 received other weights for version 3"):
        transfer.sync.publish(4)
    assert transfer.events.count("publish-0") == 1


NEXT = WeightRecord(version=5, received=DIGEST, loaded=222)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([NEXT, NEXT], ""),
        ([replace(NEXT, version=4), NEXT], "a serves version 4 instead of 5"),
        ([NEXT, replace(NEXT, version=6)], "b serves version 6 instead of 5"),
        ([NEXT, NEXT, replace(NEXT, received=11)], "c received other weights for version 5 than were sent"),
        ([NEXT, replace(NEXT, loaded=223)], "a and b hold different parameters for version 5"),
    ],
)
def test_records_that_do_not_agree_are_refused(records, message):
    named = dict(zip("abc", records, strict=False))
    if not message:
        check_records(named, 5, DIGEST)
        return
    with pytest.raises(WeightTransferError, match=message):
        check_records(named, 5, DIGEST)
