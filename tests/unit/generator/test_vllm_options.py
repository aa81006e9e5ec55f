"""vLLM's options on CPUs and GPUs; a module that records them stands in for vLLM."""

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from rft_cluster import weights
from rft_cluster.config import load_config
from rft_cluster.generator.vllm_options import EngineOptions, environment, load_engine

SHARED = ["cluster.device=cuda", "learners.count=1", "generators.gpus=0.4", "learners.gpus=0.6"]
APART = ["cluster.device=cuda", "learners.count=1", "generators.gpus=1", "learners.gpus=1"]
Options = Callable[..., dict[str, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Options:
    """vLLM's options in a run with these overrides."""

    def module(name: str, **content: Any) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    module("vllm", LLM=lambda **options: options)
    engines = {transfer: f"engine for {transfer}" for transfer in ("shared_memory", "nccl", "ipc")}
    receivers = module("rft_cluster.weights.receivers", register=lambda: None, ENGINES=engines)
    monkeypatch.setattr(weights, "receivers", receivers, raising=False)
    for name in (*environment("cpu"), "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # set by the engine; put back after the test
    return lambda *overrides: load_engine(EngineOptions.of_run("model", load_config("digits", list(overrides))), {})


def test_nothing_is_compiled_on_a_cpu(asked: Options, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "")
    asked(*APART)
    assert os.environ["TORCHDYNAMO_DISABLE"] == ""
    asked()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


def test_the_engine_is_able_to_sleep_only_where_it_shares_its_gpu(asked: Options):
    shared = asked(*SHARED)
    assert shared["enable_sleep_mode"] is True
    assert shared["weight_transfer_config"] == {"backend": "engine for ipc"}
    apart = asked(*APART)
    assert apart["enable_sleep_mode"] is False
    assert apart["weight_transfer_config"] == {"backend": "engine for nccl"}
    on_cpu = asked()
    assert not on_cpu.get("enable_sleep_mode", False)
    assert on_cpu["weight_transfer_config"] == {"backend": "engine for shared_memory"}


def test_no_kernels_of_flashinfer_are_tuned_on_gpus(asked: Options):
    for overrides in (SHARED, APART):
        assert asked(*overrides)["kernel_config"] == {"enable_flashinfer_autotune": False}
    assert "kernel_config" not in asked()


@pytest.mark.parametrize(("gpus", "backend"), [(1, "uni"), (2, "mp"), (4, "mp")])
def test_an_engine_with_several_gpus_starts_processes_and_not_ray_actors(asked: Options, gpus: int, backend: str):
    """In a placement group vLLM would choose Ray, and then refuse the bundle that has all of the engine's GPUs."""
    options = asked(*APART, f"generators.gpus={gpus}")
    assert (options["tensor_parallel_size"], options["distributed_executor_backend"]) == (gpus, backend)
    for others in ([], SHARED):
        assert asked(*others)["distributed_executor_backend"] == "uni"


def test_the_options_of_a_run_are_those_of_its_configuration(asked: Options):
    tokens = ["model.max_prompt_tokens=100", "sampling.max_tokens=20"]
    options = asked("run.seed=7", "generators.max_concurrent=5", *tokens)
    assert (options["model"], options["seed"], options["max_num_seqs"]) == ("model", 7, 5)
    assert options["max_model_len"] == 120
