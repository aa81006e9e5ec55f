"""A generator's answers in each of its states. vLLM's handling of weights is in the integration tests."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from some_prompt import some_prompt

from rft_cluster.common.errors import EngineFailed, StaleGenerator, UserError, WeightTransferError
from rft_cluster.generator.generator import Generator
from rft_cluster.generator.weight_state import State
from rft_cluster.messages import Augmentation, Group, Sampling
from tests.unit.generator.recording import PROMPTS, RecordingEngine, generator_on

SAMPLING = Sampling(2, 1.0, 8)
WRONG = WeightTransferError("1 of 9 tensors arrived with other bytes")


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


@pytest.fixture
def generator(engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch) -> Generator:
    return generator_on(engine, monkeypatch)


def background(work: Callable[..., list[Group]], *arguments: Any) -> Future[list[Group]]:
    """Call `work` in a thread that ends with the tests, even one that hangs."""
    future: Future[list[Group]] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001 - not swallowed: the test asks for it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def load(generator: Generator, version: int) -> None:
    generator.start_weight_update()
    generator.update_weights({"path": "memory"})
    generator.finish_weight_update(version)


def send(generator: Generator, version: int) -> None:
    load(generator, version)
    generator.verify_weights(version, {})


def test_the_engine_is_shown_an_image_as_the_prompt_changes_it(engine, generator):
    send(generator, 1)
    how = Augmentation((0, 0, 1, 1), True, 0.0, (1, 1, 1))
    changed = replace(PROMPTS[0], prompt_id="train/0/9", example=PROMPTS[0].example.changed(how))
    generator.generate([PROMPTS[0], changed], SAMPLING, version=1)
    assert engine.images == [b"a picture", (b"a picture", how)]


def test_groups_wait_for_the_verification_as_long_as_for_a_call(engine, monkeypatch):
    generator = generator_on(engine, monkeypatch, "cluster.step_timeout=0.02", "scoring.time_limit=0.01")
    load(generator, 1)
    with pytest.raises(WeightTransferError, match=r"version 1 was not verified within 0\.02 s \(cluster\.step_timeout"):
        generator.generate(PROMPTS, SAMPLING, version=1)


def unfinished(asked: Future[list[Group]]) -> bool:
    with pytest.raises(TimeoutError):
        asked.result(timeout=0.05)
    return True


def submitted(engine: RecordingEngine) -> bool:
    """True when the engine has the requests of all prompts."""
    end = time.monotonic() + 10
    while len(engine.images) < len(PROMPTS) and time.monotonic() < end:
        time.sleep(0.001)
    return len(engine.images) == len(PROMPTS)


def in_flight(generator: Generator, engine: RecordingEngine) -> Future[list[Group]]:
    """Ask for completions by weights of version 1, which the engine does not finish."""
    send(generator, 1)
    engine.writes = False
    asked = background(generator.generate, PROMPTS, SAMPLING, 1)
    assert submitted(engine) and unfinished(asked)
    return asked


def test_without_weights_it_does_not_generate(generator: Generator):
    with pytest.raises(StaleGenerator, match="asked for version 0, but this generator holds version None"):
        generator.generate(PROMPTS, SAMPLING, version=0)


def test_groups_come_in_the_order_of_their_prompts(generator: Generator):
    send(generator, 1)
    groups = generator.generate(PROMPTS, SAMPLING, version=1)
    assert [group.prompt for group in groups] == PROMPTS
    assert [len(group.completions) for group in groups] == [2, 2, 2]
    first = groups[0].completions[0]
    assert (first.token_ids, first.generator_logprobs, first.policy_version) == ([7, 8], [-1.0, -2.0], 1)
    assert generator.generate([], SAMPLING, version=1) == []


def test_the_caches_of_the_old_weights_are_emptied_before_the_new_ones_are_served(
    generator: Generator, engine: RecordingEngine
):
    load(generator, 1)
    assert engine.calls == [
        ("start_weight_update",),
        ("update_weights", {"path": "memory"}),
        ("finish_weight_update",),
        ("reset_prefix_cache", False),
        "reset_encoder_cache",
    ]
    assert engine.stamp == "1"


def test_tokens_that_the_old_weights_still_have_in_flight_are_dropped(generator: Generator, engine: RecordingEngine):
    for name, stale in (("running", 0), ("preempted", 1)):
        engine.scheduled[name] = SimpleNamespace(num_stale_output_tokens=stale, drop_stale_output=False)
    load(generator, 1)
    assert [request.drop_stale_output for request in engine.scheduled.values()] == [False, True]


def test_no_group_leaves_before_the_verification(generator: Generator, engine: RecordingEngine):
    load(generator, 1)
    asked = background(generator.generate, PROMPTS, SAMPLING, 1)
    assert submitted(engine) and unfinished(asked)
    assert not engine.unfinished, "all is written and only the verification is waited for"
    record = generator.verify_weights(1, {})
    assert (record.version, record.received) == (1, 22)
    assert len(asked.result(timeout=5)) == 3


@pytest.mark.parametrize("writes", [True, False], ids=["written", "being written"])
def test_groups_of_weights_that_fail_their_verification_are_refused(
    writes: bool, generator: Generator, engine: RecordingEngine
):
    load(generator, 1)
    engine.wrong, engine.writes = WRONG, writes
    asked = background(generator.generate, PROMPTS, SAMPLING, 1)
    assert submitted(engine) and unfinished(asked)
    assert bool(engine.unfinished) is not writes
    with pytest.raises(WeightTransferError, match="arrived with other bytes"):
        generator.verify_weights(1, {})
    with pytest.raises(WeightTransferError, match="arrived with other bytes"):
        asked.result(timeout=5)
    assert not engine.unfinished
    with pytest.raises(StaleGenerator, match="holds version None"):
        generator.generate(PROMPTS, SAMPLING, version=1)
    engine.wrong, engine.writes = None, True
    send(generator, 2)  # the next update ends that state
    assert len(generator.generate(PROMPTS, SAMPLING, version=2)) == 3


def test_a_verification_of_another_version_is_refused(generator: Generator):
    send(generator, 1)
    with pytest.raises(WeightTransferError, match="asked to verify version 2, but it holds 1"):
        generator.verify_weights(2, {})
    assert generator._weights.state is State.NO_WEIGHTS


def test_an_update_that_follows_on_one_without_verification_refuses_its_groups(generator: Generator):
    load(generator, 1)
    asked = background(generator.generate, PROMPTS, SAMPLING, 1)
    assert unfinished(asked)
    send(generator, 2)
    with pytest.raises(WeightTransferError, match="another update began before this one was verified"):
        asked.result(timeout=5)


def test_a_request_during_an_update_begins_with_the_new_weights(generator: Generator, engine: RecordingEngine):
    send(generator, 1)
    generator.start_weight_update()
    asked = background(generator.generate, PROMPTS, SAMPLING, 1)
    generator.update_weights({})
    assert unfinished(asked)
    assert not engine.unfinished, "the engine has none of it"
    generator.finish_weight_update(2)
    generator.verify_weights(2, {})
    assert {c.policy_version for group in asked.result(timeout=5) for c in group.completions} == {2}


def test_requests_in_flight_wait_for_the_update_and_lose_their_keys_and_values(
    generator: Generator, engine: RecordingEngine
):
    asked = in_flight(generator, engine)
    generator.start_weight_update()
    engine.writes = True
    assert unfinished(asked), "while weights are being updated the engine does not step"
    generator.update_weights({})
    generator.finish_weight_update(2)
    assert ("reset_prefix_cache", True) in engine.calls
    generator.verify_weights(2, {})
    assert len(asked.result(timeout=5)) == 3


def test_completions_by_older_weights_than_asked_are_refused(generator: Generator, engine: RecordingEngine):
    send(generator, 2)
    engine.stamp = "1"
    with pytest.raises(StaleGenerator, match="train/0/2: asked for version 2, written by 1"):
        generator.generate(PROMPTS, SAMPLING, version=2)


def test_an_update_that_fails_ends_requests_in_flight_and_those_that_wait_for_it(
    generator: Generator, engine: RecordingEngine
):
    running = in_flight(generator, engine)
    generator.start_weight_update()
    asked = background(generator.generate, PROMPTS, SAMPLING, 1)
    assert unfinished(asked)
    engine.not_loaded = ["layers.0.mlp"]
    with pytest.raises(WeightTransferError, match="version 2 arrived but 1 layers did not load theirs"):
        generator.finish_weight_update(2)
    with pytest.raises(WeightTransferError, match="layers did not load theirs"):
        running.result(timeout=5)
    with pytest.raises(StaleGenerator, match="asked for version 1, but this generator holds version None"):
        asked.result(timeout=5)
    assert not engine.unfinished


def test_an_engine_that_failed_says_so_to_all_that_come_after(generator: Generator, engine: RecordingEngine):
    send(generator, 1)
    engine.breaks = MemoryError("no room for the logits")
    for _ in range(2):
        with pytest.raises(EngineFailed, match=r"its engine failed \(MemoryError: no room for the logits\)"):
            generator.generate(PROMPTS, SAMPLING, version=1)
    with pytest.raises(EngineFailed, match="no room for the logits"):
        generator.start_weight_update()
    assert generator._weights.state is State.FAILED


def test_prompts_of_which_one_is_refused_leave_nothing_in_the_engine(generator: Generator, engine: RecordingEngine):
    send(generator, 1)
    engine.writes = False
    with pytest.raises(OSError, match="cannot identify image"):
        generator.generate([*PROMPTS, some_prompt(image=b"no picture")], SAMPLING, version=1)
    assert not engine.unfinished


def test_a_request_that_the_engine_refuses_takes_those_before_it_along(generator: Generator, engine: RecordingEngine):
    send(generator, 1)
    engine.writes, add = False, engine.add_request

    def refuse_the_third(request_id: str, *request: Any) -> None:
        if len(engine.unfinished) == 2:
            raise ValueError("longer than the model's window")
        add(request_id, *request)

    engine.add_request = refuse_the_third
    with pytest.raises(ValueError, match="longer than the model's window"):
        generator.generate(PROMPTS, SAMPLING, version=1)
    assert not engine.unfinished


def test_images_are_prepared_while_the_engine_s_thread_has_other_work(generator: Generator, engine: RecordingEngine):
    send(generator, 1)
    prepared, image = threading.Event(), generator._encoder.image
    generator._encoder.image = lambda *what: (prepared.set(), image(*what))[1]
    busy = background(generator._on_thread, lambda: prepared.wait(10))
    assert len(generator.generate(PROMPTS, SAMPLING, version=1)) == len(PROMPTS)
    assert busy.result(timeout=5), "they waited for the engine's thread"


def test_a_generator_that_slept_has_no_weights(engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch):
    """Level 2 gives the weights away, too: until others arrive there is nothing to generate with."""
    shared = ("cluster.device=cuda", "learners.count=1", "generators.gpus=0.4", "learners.gpus=0.6")
    sleeper = generator_on(engine, monkeypatch, *shared)
    send(sleeper, 4)
    assert sleeper.generate([], SAMPLING, version=4) == []
    engine.calls.clear()
    for _ in range(2):  # SFT updates several times before an evaluation
        sleeper.sleep()
    with pytest.raises(StaleGenerator, match="asked for version 4, but this generator holds version None"):
        sleeper.generate([], SAMPLING, version=4)
    sleeper.wake_up(["weights"])
    sleeper.wake_up(["kv_cache"])
    with pytest.raises(StaleGenerator, match="holds version None"):
        sleeper.generate([], SAMPLING, version=4)
    assert engine.calls == [("sleep", 2), ("wake_up", "weights"), ("wake_up", "kv_cache")]
    sleeper.sleep()
    assert engine.calls[-1] == ("sleep", 2)


def test_what_a_sleep_left_in_deepstack_s_rows_and_in_positions_is_taken_away(
    engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch
):
    """vLLM reads these before it writes them, and keeps none of them through a sleep of level 2."""
    shared = ("cluster.device=cuda", "learners.count=1", "generators.gpus=0.4", "learners.gpus=0.6")
    sleeper = generator_on(engine, monkeypatch, *shared)
    engine.model.deepstack_input_embeds = [torch.full((4, 2), torch.nan) for _ in range(3)]
    positions = torch.full((3, 9), 2**40)
    engine.worker.model_runner.model_state = SimpleNamespace(rope_state=SimpleNamespace(positions=positions))
    sleeper.sleep()
    sleeper.wake_up(["weights"])
    assert all(torch.equal(rows, torch.zeros(4, 2)) for rows in engine.model.deepstack_input_embeds)
    assert not positions.any()
    engine.worker.model_runner.model_state = SimpleNamespace(rope_state=None)  # of a model without M-RoPE
    sleeper.wake_up(["weights"])


def test_an_engine_that_finds_no_memory_when_it_wakes_up_says_what_to_change(
    engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch
):
    shared = ("cluster.device=cuda", "learners.count=1", "generators.gpus=0.4", "learners.gpus=0.6")
    sleeper = generator_on(engine, monkeypatch, *shared)
    sleeper.sleep()

    def wake_up(tags: list[str]) -> None:
        raise RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62")

    monkeypatch.setattr(engine, "wake_up", wake_up)
    with pytest.raises(
        UserError, match=r"^a generator is out of memory .* set generators\.gpu_memory to the free share"
    ):
        sleeper.wake_up(["kv_cache"])


def test_a_batch_that_older_weights_wrote_is_refused_and_the_engine_goes_on(
    generator: Generator, engine: RecordingEngine
):
    """After learners were restored versions go back: a call of before may come late."""
    send(generator, 2)
    engine.stamp = "1"
    with pytest.raises(StaleGenerator, match="asked for version 2, written by 1"):
        generator.generate(PROMPTS, SAMPLING, version=2)
    engine.stamp = "2"
    assert len(generator.generate(PROMPTS, SAMPLING, version=2)) == len(PROMPTS)
