"""Completions that are scored together, and the one that caused a failure: without processes or time."""

import asyncio
from collections.abc import Iterator

import pytest
from some_prompt import some_prompt

from rft_cluster.messages import Completion
from rft_cluster.rewards.child import Kind
from rft_cluster.rewards.pending import Call, Pending

ONE, BATCH = Kind(batch=False, concurrent=False), Kind(batch=True, concurrent=False)
ASYNC, ASYNC_BATCH = Kind(batch=False, concurrent=True), Kind(batch=True, concurrent=True)
PROMPT = some_prompt()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def calls(loop: asyncio.AbstractEventLoop, count: int) -> list[Call]:
    return [Call(0, PROMPT, Completion([1], [-0.1], str(i), "stop", 0), loop.create_future()) for i in range(count)]


def asked(pending: Pending, kind: Kind) -> list[list[str]]:
    """The completions of each request that is made now."""
    requests = iter(lambda: pending.next(kind), None)
    return [[call.completion.text for call in request.calls] for request in requests]


def values(made: list[Call]) -> list[float | str | None]:
    return [call.value.result() if call.value.done() else None for call in made]


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        (ONE, ["0"], ["1"]),
        (BATCH, ["0 1 2 3"], ["4 5"]),
        (ASYNC, ["0", "1", "2", "3"], ["4"]),
        (ASYNC_BATCH, ["0 1 2 3"], ["4 5"]),
    ],
)
def test_what_is_asked_at_once(loop, kind, first, then):
    pending = Pending(4)
    pending.add(calls(loop, 6))
    assert asked(pending, kind) == [words.split() for words in first]
    pending.answered(0, [0.5] * len(first[0].split()))
    assert asked(pending, kind) == [words.split() for words in then]


def test_what_others_have_left_of_the_limit_makes_a_batch(loop):
    pending = Pending(4)
    pending.add(calls(loop, 3))
    assert asked(pending, ASYNC_BATCH) == [["0", "1", "2"]]
    pending.add(calls(loop, 3))
    assert asked(pending, ASYNC_BATCH) == [["0"]]


def test_who_has_been_cancelled_is_passed_over(loop):
    pending, made = Pending(4), calls(loop, 3)
    pending.add(made)
    made[0].value.cancel()
    assert asked(pending, ONE) == [["1"]]
    made[1].value.cancel()
    pending.answered(0, [0.5])  # nobody waits for it any more
    made[2].value.cancel()
    assert not pending.left and asked(pending, ONE) == []


def test_the_only_one_in_flight_is_to_blame(loop):
    pending, (made,) = Pending(4), calls(loop, 1)
    pending.add([made])
    asked(pending, ONE)
    pending.begun(0)
    pending.died("gone")
    assert values([made]) == ["gone"]


def test_one_that_had_not_begun_is_to_blame_the_second_time(loop):
    pending, (made,) = Pending(4), calls(loop, 1)
    pending.add([made])
    asked(pending, ONE)
    pending.died("gone")
    assert values([made]) == [None] and asked(pending, ONE) == [["0"]]
    pending.died("gone again")
    assert values([made]) == ["gone again"]


def test_of_several_each_is_asked_once_more_alone(loop):
    pending, made = Pending(3), calls(loop, 4)
    pending.add(made)
    assert asked(pending, ASYNC) == [["0"], ["1"], ["2"]]
    pending.begun(0)
    pending.died("gone")
    assert asked(pending, ASYNC) == [["0"]]
    pending.answered(3, [0.5])
    assert asked(pending, ASYNC) == [["1"]]
    pending.begun(4)
    pending.died("gone")
    assert asked(pending, ASYNC) == [["2"]]
    pending.answered(5, [0.25])
    assert asked(pending, ASYNC) == [["3"]]
    assert values(made) == [0.5, "gone", 0.25, None]


def test_a_batch_that_failed_is_asked_one_by_one_when_the_others_are_done(loop):
    pending, made = Pending(4), calls(loop, 3)
    pending.add(made[:2])
    asked(pending, ASYNC_BATCH)
    pending.add(made[2:])
    assert asked(pending, ASYNC_BATCH) == [["2"]]
    pending.answered(0, "KeyError")
    assert asked(pending, ASYNC_BATCH) == []
    pending.answered(1, [0.5])
    assert asked(pending, ASYNC_BATCH) == [["0"]]
    pending.answered(2, "KeyError")
    assert asked(pending, ASYNC_BATCH) == [["1"]]
    pending.answered(3, [0.25])
    assert values(made) == ["KeyError", 0.25, 0.5]


def test_who_waits_is_told_that_nothing_will_come(loop):
    pending, made = Pending(1), calls(loop, 2)
    pending.add(made)
    asked(pending, ONE)
    pending.died("gone")
    pending.give_up(ValueError("no module"))
    assert all(isinstance(call.value.exception(), ValueError) for call in made)
    assert not pending.left and not pending.asked
