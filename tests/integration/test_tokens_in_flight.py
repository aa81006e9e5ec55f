"""vLLM's real asynchronous scheduler, which GPUs have and CPUs not, when weights change while tokens are in flight."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rft_cluster.generator.engine_stats import EngineStats
from rft_cluster.generator.engine_thread import EngineThread
from rft_cluster.generator.weight_state import WeightState

OLD, NEW = 7, 9  # the tokens that the weights sample


@pytest.fixture
def scheduler(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With blocks for two prompts and not for their first tokens, and two requests: one will be preempted."""
    for name, value in {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        model=tiny_model, max_model_len=64, block_size=16, enable_prefix_caching=False, enforce_eager=True
    ).create_engine_config()
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    blocks = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    config.cache_config.num_gpu_blocks = 4
    scheduler = AsyncScheduler(config, blocks, StructuredOutputManager(config), block_size=16)
    for name in ("stays", "preempted"):
        scheduler.add_request(Request(name, [5] * 16, SamplingParams(max_tokens=8), None))
    return scheduler


def delivered(scheduler: Any, batch: Any, token: int) -> dict[str, list[int]]:
    """The tokens that requests get when a batch comes back in which each sampled `token`."""
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(batch.num_scheduled_tokens)
    places = {name: place for place, name in enumerate(names)}
    came_back = ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=[[token]] * len(names))
    outputs = scheduler.update_from_output(batch, came_back)
    return {one.request_id: one.new_token_ids for group in outputs.values() for one in group.outputs}


@pytest.mark.parametrize(("cured", "late"), [(False, {"preempted": [OLD]}), (True, {})])
def test_no_token_of_the_old_weights_comes_after_the_new_ones_are_served(scheduler: Any, cured: bool, late: dict):
    """Without the cure one comes, and would be stamped with the new version. If not, vLLM has mended it."""
    in_flight = [scheduler.schedule(), scheduler.schedule()]
    assert {name: one.status.name for name, one in scheduler.requests.items()} == {
        "stays": "RUNNING",
        "preempted": "PREEMPTED",
    }
    assert scheduler.reset_prefix_cache(True)  # the weights have changed
    if cured:
        thread = EngineThread(WeightState(None), EngineStats())
        thread.engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler)))
        thread.drop_tokens_in_flight()
    assert [delivered(scheduler, batch, OLD) for batch in in_flight] == [late, {}]
    # Both are written on, by the new weights alone.
    assert delivered(scheduler, scheduler.schedule(), NEW) == {"stays": [NEW], "preempted": [NEW]}
