"""Runs that cannot fit are refused before they start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan import check
from rft_cluster.plan.check import check_memory, object_store_note, on_a_cpu, on_a_gpu, on_a_host
from rft_cluster.plan.memory import snapshot

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHAPES = Shapes.of(json.loads((BENCHMARKS / "qwen2_vl_2b.json").read_text())["config"], Path("config.json"))
SMALL = replace(SHAPES, layers=1, vision_layers=1, vocabulary=1000)
HUGE = replace(SHAPES, layers=500, hidden=60_000, query=60_000, inner=200_000)


@pytest.fixture(autouse=True)
def a_large_machine_without_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(check, "memory_here", lambda: 10**12)
    monkeypatch.setattr(check, "object_store_here", lambda: 3 * 10**11)


def digits(*overrides: str) -> Config:
    return load_config("digits", list(overrides))


@pytest.mark.parametrize("lora", [[], ["model.lora.rank=16"]])
@pytest.mark.parametrize("kl", ["0", "0.04"])
@pytest.mark.parametrize(("learners", "generators"), [(1, 1), (4, 1), (1, 4)])
def test_what_weights_take_is_held_against_the_memory(lora, kl, learners, generators):
    config = digits(*(f"learners.count={learners}", f"generators.count={generators}", f"algorithm.kl_beta={kl}", *lora))
    check_memory(config, SMALL)
    with pytest.raises(UserError, match=r"million parameters take .* of memory .* and this machine has"):
        check_memory(config, HUGE)


def test_the_least_of_a_cpu_by_hand():
    count, gib = SHAPES.parameters, 2**30
    # 4 + 4 + 8 bytes and a reference of 2; an engine's weights in FP32, and its cache of 1 GiB
    one = digits("learners.count=1", "cluster.dtype=float32")
    assert on_a_cpu(SHAPES, one) == 18 * count + 4 * count + gib
    # Four ranks load 6 bytes a parameter each, before each keeps a quarter.
    assert on_a_cpu(SHAPES, digits("learners.count=4", "cluster.dtype=float32")) == 4 * 6 * count + 4 * count + gib


@pytest.mark.parametrize(("gigabytes", "fits"), [(24, False), (80, True)])
def test_a_gpu_is_too_small_for_all_weights_of_the_2b_model(monkeypatch, gigabytes, fits):
    monkeypatch.setattr(check, "smallest_gpu", lambda: ("a card", gigabytes * 10**9))
    if fits:
        check_memory(load_config("flower102_1gpu", []), SHAPES)
        return
    with pytest.raises(UserError, match=r"take 39.8 GB of a GPU's memory.*learners.cpu_offload=true or model.lora"):
        check_memory(load_config("flower102_1gpu", []), SHAPES)
    for cure in ("learners.cpu_offload=true", "model.lora.rank=16"):
        check_memory(load_config("flower102_1gpu", [cure]), SHAPES)
    check_memory(load_config("flower102", ["learners.count=2"]), SHAPES)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("flower102_24gb", 24), ("flower102_1gpu", 80), ("flower102_closed", 80), ("flower102", 80), ("photos_1gpu", 80)],
)
def test_the_configurations_fit_what_they_are_for(monkeypatch, name, gigabytes):
    monkeypatch.setattr(check, "smallest_gpu", lambda: ("a card", gigabytes * 10**9))
    check_memory(load_config(name, []), SHAPES)


@pytest.mark.parametrize("tokens", [1536, 3072], ids=["of 4.5 tokens", "of 12 tokens"])
def test_200_listed_names_fit_80_gb(monkeypatch, tokens):
    monkeypatch.setattr(check, "smallest_gpu", lambda: ("a card", 80 * 10**9))
    check_memory(load_config("flower102_closed", [f"model.max_prompt_tokens={tokens}"]), SHAPES)


@pytest.mark.parametrize(
    ("name", "sizes"), [("flower102_qwen3vl", "qwen3_vl_2b"), ("flower102_qwen25vl", "qwen2_5_vl_3b")]
)
def test_the_configurations_of_other_families_fit_80_gb(monkeypatch, name, sizes):
    shapes = Shapes.of(json.loads((BENCHMARKS / f"{sizes}.json").read_text())["config"], Path("config.json"))
    monkeypatch.setattr(check, "smallest_gpu", lambda: ("a card", 80 * 10**9))
    config = load_config(name, [])
    check_memory(config, shapes)
    assert config.model.max_image_tokens == 512


@pytest.mark.parametrize(("overrides", "needed"), [((), 24), (("learners.cpu_offload=true",), 30)])
def test_a_host_that_cannot_hold_two_copies_of_the_state_is_refused(monkeypatch, overrides, needed):
    """FP32 weights and moments are 12 bytes a parameter: a copy of the GPU's, and one in the object store. Offloaded,
    the first is there, with gradients (4) and the BF16 reference (2)."""
    config, count = load_config("flower102_1gpu", overrides), SHAPES.parameters
    monkeypatch.setattr(check, "smallest_gpu", lambda: ("a card", 80 * 10**9))
    monkeypatch.setattr(check, "object_store_here", lambda: 12 * count)
    monkeypatch.setattr(check, "memory_here", lambda: needed * count)
    check_memory(config, SHAPES)
    monkeypatch.setattr(check, "object_store_here", lambda: 2 * count)
    assert on_a_host(SHAPES, config, check.object_store_here()) == (needed - 10) * count, "the rest is on the disk"
    monkeypatch.setattr(check, "object_store_here", lambda: 12 * count)
    monkeypatch.setattr(check, "memory_here", lambda: needed * count - 1)
    with pytest.raises(UserError, match=r"^while the learners' state is saved, it takes .*: set model.lora="):
        check_memory(config, SHAPES)


def test_an_engine_s_share_may_be_what_is_too_small():
    config = load_config("flower102", ["learners.count=64", "generators.gpu_memory=0.5"])
    assert on_a_gpu(SHAPES, config) == 2 * SHAPES.parameters / 0.5


@pytest.mark.parametrize(("every", "taken"), [(0, 12), (1, 36)])
def test_snapshots_that_the_object_store_cannot_hold_are_said(monkeypatch, every, taken):
    config, count = digits(f"cluster.snapshot_every={every}"), SHAPES.parameters
    monkeypatch.setattr(check, "object_store_here", lambda: taken * count)
    assert object_store_note(config, SHAPES) == ""
    monkeypatch.setattr(check, "object_store_here", lambda: taken * count - 1)
    assert object_store_note(config, SHAPES).startswith("note: snapshots of the learners take ")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert object_store_note(config, SHAPES) == "", "another machine's is not known"


def test_a_frozen_parameter_takes_a_third_of_a_trained_one():
    frozen = digits("model.freeze_vision=true")
    assert snapshot(SHAPES, digits()) - snapshot(SHAPES, frozen) == 8 * SHAPES.vision
    # The base is BF16, and frozen.
    adapters = SHAPES.adapters(16)
    assert snapshot(SHAPES, digits("model.lora.rank=16")) == 2 * SHAPES.parameters + 12 * adapters


def test_a_cluster_that_is_joined_is_not_this_machine(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_memory(digits(), HUGE)
