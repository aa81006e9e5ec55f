"""Seconds by hand, on a card of round numbers, and what each setting changes."""

import json
from pathlib import Path

import pytest

from rft_cluster.config import Config, load_config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.cards import CARDS, Card
from rft_cluster.plan.seconds import (
    ADAM_BYTES,
    ADAM_PASSES,
    COPIES,
    ENGINE_SECONDS,
    PRODUCTS,
    Learning,
    Seconds,
    decode_seconds,
    forward_flops,
    generate_seconds,
    learning,
    optimizer_seconds,
    step_seconds,
    training_flops,
    transfer_seconds,
)
from rft_cluster.plan.work import group_row, learner_share

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHAPES = Shapes.of(json.loads((BENCHMARKS / "qwen2_vl_2b.json").read_text())["config"], Path("config.json"))
ROUND = Card("round", 80, 1e15, 1e12, 1e11)
PROMPT = PromptLength(432, 90)
LORA = ("model.lora.rank=64", "model.lora.alpha=128")
TEXT, VISION = 28 * 46_797_824, 32 * 19_677_440  # weights of the layers


def one_gpu(*overrides: str) -> Config:
    return load_config("flower102_1gpu", list(overrides))


def test_flops_of_a_group_by_hand():
    row = group_row(PROMPT, 8, 53)  # 522 + 8 x 52 tokens, 1,728 patches, 424 predicted tokens
    pairs = 522**2 / 2 + 8 * (522 * 52 + 52**2 / 2)
    text = 2 * TEXT * 938 + 28 * 4 * 1536 * pairs
    vision = 2 * VISION * 1728 + 32 * 4 * 1280 * 1728**2 + 2 * 1_505_280 * 1728 + 2 * 34_087_936 * 432
    head = 2 * 151_936 * 1536 * 424
    assert forward_flops(SHAPES, row) == pytest.approx(text + vision + head)
    # Forward and backward take three forwards, and the head one more, which is computed again in the backward.
    assert training_flops(SHAPES, one_gpu(), row) == pytest.approx(3 * (text + vision) + 4 * head)
    again = one_gpu("learners.gradient_checkpointing=true")
    assert training_flops(SHAPES, again, row) == pytest.approx(4 * (text + vision) + 4 * head)
    assert training_flops(SHAPES, one_gpu(*LORA), row) == pytest.approx(2 * text + vision + 3 * head)
    frozen = one_gpu("model.freeze_vision=true")
    assert training_flops(SHAPES, frozen, row) == pytest.approx(3 * text + vision + 4 * head)


def test_decoding_is_bound_by_the_weights_by_hand():
    config = one_gpu()
    weights = 2 * (TEXT + 151_936 * 1536)  # the vision tower rests
    cache, sampler = 128 * 600 * 28_672, 8 * 128 * 151_936 * 4
    bytes_read = weights + cache + sampler
    expected = bytes_read / (COPIES * 1e12) + ENGINE_SECONDS["cuda"]
    assert decode_seconds(SHAPES, config, ROUND, 600, 128) == pytest.approx(expected)
    slow = Card("slow at products", 80, 1e12, 1e15, 1e11)
    flops = 128 * (2 * TEXT + 28 * 4 * 1536 * 600 + 2 * 151_936 * 1536)
    expected = flops / (PRODUCTS * 1e12) + ENGINE_SECONDS["cuda"]
    assert decode_seconds(SHAPES, config, slow, 600, 128) == pytest.approx(expected)


def test_more_completions_than_seats_take_turns():
    config = one_gpu("generators.max_concurrent=32")
    each = decode_seconds(SHAPES, config, ROUND, 522 + 32, 32)
    prefill = generate_seconds(SHAPES, config, ROUND, PROMPT, 16, 8, 0)
    assert generate_seconds(SHAPES, config, ROUND, PROMPT, 16, 8, 64) == pytest.approx(prefill + 4 * 64 * each)


def test_two_gpus_for_an_engine_read_half_of_the_weights_each():
    one, two = load_config("flower102", []), load_config("flower102", ["generators.gpus=2"])
    times = [decode_seconds(SHAPES, config, ROUND, 600, 128) - ENGINE_SECONDS["cuda"] for config in (one, two)]
    assert times[0] == pytest.approx(2 * times[1])


def test_the_optimizer_is_bound_by_memory_or_by_the_number_of_tensors():
    moved = ADAM_PASSES * ADAM_BYTES * 2_208_985_600
    assert optimizer_seconds(SHAPES, one_gpu(), ROUND) == pytest.approx(moved / (COPIES * 1e12))
    fast = Card("fast", 80, 1e15, 1e16, 1e11)
    assert optimizer_seconds(SHAPES, one_gpu(), fast) == pytest.approx(729 * 1e-4)


@pytest.mark.parametrize(
    ("change", "slower"),
    [
        ("learners.gradient_checkpointing=true", True),
        ("learners.cpu_offload=true", True),
        ("algorithm.updates_per_step=2", True),
        ("algorithm.kl_beta=0", False),
    ],
)
def test_what_costs_time_in_learning(change, slower):
    def of(config: Config) -> float:
        return learning(SHAPES, config, CARDS["h100"], learner_share(config, PROMPT, 256)).seconds

    assert (of(one_gpu(change)) > of(one_gpu())) is slower


def test_a_transfer_on_a_shared_gpu_waits_for_sleep_and_wake():
    shared, apart = (transfer_seconds(SHAPES, load_config(name, []), ROUND) for name in ("flower102_1gpu", "flower102"))
    assert shared > 0.5 and 2 * 2_208_985_600 / 1e11 + 729 * 2e-4 < apart < 0.4


def test_roles_overlap_where_staleness_allows():
    learner = Learning(1.0, 2.0, 1.5, optimizer=1.0, overlap=True)
    assert learner.seconds == 3 and learner.bound == "links"
    assert Seconds(2, learner, 0.5, 0.25, overlap=False).step == 5.75
    assert Seconds(2, learner, 0.5, 0.25, overlap=True).step == 3.75
    assert Learning(1.0, 2.0, 1.5, optimizer=1.0, overlap=False).seconds == 5.5  # on a CPU nothing overlaps
    ahead = load_config("flower102", ["schedule.max_staleness=1"])
    assert step_seconds(SHAPES, ahead, ROUND, PROMPT, 64).overlap


def test_a_step_of_sft_neither_generates_nor_transfers():
    sft = load_config("flower102", ["algorithm.objective=sft", "algorithm.kl_beta=0"])
    found = step_seconds(SHAPES, sft, ROUND, PROMPT, 64)
    assert (found.generate, found.transfer) == (0, 0) and found.learn > 0
