"""Reward functions that take a batch or are `async`: how many at once, and what a failure costs the others."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from some_prompt import some_prompt

from rft_cluster.common.errors import UserError
from rft_cluster.messages import Completion, Prompt
from rft_cluster.rewards import isolation
from rft_cluster.rewards.child import Kind, kind_of
from rft_cluster.rewards.isolation import IsolatedFunction
from tests.unit.rewards import own_functions

LIMIT, AT_ONCE = 1.0, 8
OWN = "tests.unit.rewards.own_functions"


def group(seed: int, *texts: str) -> tuple[Prompt, list[Completion]]:
    prompt = some_prompt(f"train/3/{seed}", seed=seed)
    return prompt, [Completion([1], [-0.1], text, "stop", 0) for text in texts]


def scored(function: IsolatedFunction, *groups: tuple[Prompt, list[Completion]]) -> list[list[float | str]]:
    """The values of groups that are scored at the same time."""

    faults: list[dict] = []  # in what the loop calls, which nobody awaits

    async def all_of_them() -> list[list[float | str]]:
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        return await asyncio.gather(*(function(*one) for one in groups))

    values = asyncio.run(all_of_them())
    assert not faults
    return values


@pytest.fixture(scope="module")
def judge() -> Iterator[IsolatedFunction]:
    function = IsolatedFunction(f"{OWN}:judge", LIMIT, AT_ONCE)
    yield function
    function.close()


@pytest.fixture(scope="module")
def batch() -> Iterator[IsolatedFunction]:
    function = IsolatedFunction(f"{OWN}:batch", LIMIT, AT_ONCE)
    yield function
    function.close()


# --- what a function declares


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (own_functions.judge, Kind(batch=False, concurrent=True)),
        (own_functions.called, Kind(batch=False, concurrent=True)),
        (own_functions.batch, Kind(batch=True, concurrent=False)),
        (own_functions.concurrent_batch, Kind(batch=True, concurrent=True)),
        (own_functions.wrapped, Kind(batch=False, concurrent=False)),
        (lambda p, c: 0.0, Kind(batch=False, concurrent=False)),
        (lambda completions, prompts, **more: [], Kind(batch=True, concurrent=False)),
        (max, Kind(batch=False, concurrent=False)),  # has no signature
    ],
)
def test_the_declaration_is_read(function, kind):
    assert kind_of(function, "my:f") == kind


@pytest.mark.parametrize("function", [lambda prompt, completions: 0, lambda completions, **more: 0])
def test_half_a_plural_is_refused(function):
    with pytest.raises(UserError, match=r"^rewards: 'my:f' takes .*completions.* of a batch \(prompts, completions\)$"):
        kind_of(function, "my:f")


# --- async


def test_completions_of_all_groups_share_the_limit(judge):
    scored(judge, group(0, "wait 0"))  # it has been imported
    start = time.monotonic()
    values = scored(judge, *(group(seed, *["wait 0.2"] * 8) for seed in range(4)))
    assert values == [[0.25] * 8] * 4
    assert time.monotonic() - start < 32 * 0.2 / 2  # 32 * 0.2 / 8 = 0.8 s; one after the other 6.4 s
    assert scored(judge, group(0, "most")) == [[AT_ONCE]]


def test_a_late_call_is_cancelled_and_costs_nobody_else_anything(judge, tmp_path):
    (pid, late, other, stubborn, after), _ = scored(
        judge, group(0, "pid", f"cancelled {tmp_path / 'a'}", "wait 0.2", "stubborn", "pid"), group(1, "wait 0.9")
    )
    assert (late, other, stubborn) == ("no answer within 1 s", 0.25, "no answer within 1 s")
    assert pid == after == scored(judge, group(0, "pid"))[0][0], "the process lives"
    assert (tmp_path / "a").exists()


def test_what_is_raised_is_the_completions_own(judge):
    first, second, third = scored(judge, group(0, "raise", "wait 0", "exit"))[0]
    assert first.startswith("KeyError: 'petal' (own_functions.py, line ")
    assert second == 0.25
    assert third.startswith("SystemExit: enough (own_functions.py, line ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("block", "its event loop was blocked for over 1 s"), ("die", "its process died (exit code 7)")],
)
def test_what_ends_the_process_costs_its_own_completion_and_others_are_asked_once_more(
    judge, tmp_path, monkeypatch, text, reason
):
    monkeypatch.setattr(isolation, "GRACE", 0.2)
    (before,) = scored(judge, group(0, "pid"))[0]
    asked = [tmp_path / name for name in "abc"]
    first, second = scored(
        judge, group(0, f"count {asked[0]}", text, f"count {asked[1]}"), group(1, f"count {asked[2]}")
    )
    assert (first, second) == ([0.5, reason, 0.5], [0.5])
    assert all(1 <= len(path.read_text()) <= 2 for path in asked)
    assert before != scored(judge, group(0, "pid"))[0][0], "a new process"


def test_who_has_been_cancelled_is_not_asked_about(judge, tmp_path):
    async def given_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await judge(*group(0, *["wait 0.5"] * AT_ONCE, f"count {tmp_path / 'a'}"))

    asyncio.run(given_up())
    assert scored(judge, group(1, "wait 0")) == [[0.25]]
    assert not (tmp_path / "a").exists()


def test_a_coroutine_that_nobody_awaits_is_explained():
    function = IsolatedFunction(f"{OWN}:wrapped", LIMIT, AT_ONCE)
    (reason,) = scored(function, group(0, "wait 0"))[0]
    function.close()
    assert reason == "returned a coroutine: define the function itself with async def"


# --- batches


def test_all_that_waits_makes_a_batch_up_to_the_limit(batch):
    values = scored(batch, group(100, *"aaaa"), group(200, *"bbb"), group(300, *"ccc"))
    # 4 + 3 + 1 are 8, in one batch; 2 are left.
    assert values == [[108] * 4, [208] * 3, [308, 302, 302]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise", "KeyError: 'petal' (own_functions.py, line "),
        ("hang", "no answer within 1 s"),
        ("nan", "returned nan, not a finite number"),
    ],
)
def test_a_batch_that_fails_is_asked_one_by_one(batch, text, reason):
    first, bad, last = scored(batch, group(0, "x", text, "x"))[0]
    assert bad.startswith(reason)
    assert (first, last) == ((3, 3) if text == "nan" else (1, 1))


def test_a_batch_of_the_wrong_length_is_refused(batch):
    assert scored(batch, group(0, "short", "x"))[0] == [1.0, 1.0], "asked alone each has its value"


def test_an_async_function_may_take_a_batch():
    function = IsolatedFunction(f"{OWN}:concurrent_batch", LIMIT, AT_ONCE)
    values = scored(function, group(0, "wait 0", "wait 0"), group(1, "wait 0.1"))
    assert values == [[3.25, 3.25], [3.25]]
    first, late = scored(function, group(0, "wait 0", "stubborn"))[0]
    function.close()
    assert (first, late) == (1.25, "no answer within 1 s")
