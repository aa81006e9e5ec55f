"""What adds up of vLLM's figures of a step. (With an attribute that vLLM's do not have, no engine would step.)"""

from types import SimpleNamespace

from rft_cluster.generator import engine_stats
from rft_cluster.generator.engine_stats import EngineStats

IDLE = SimpleNamespace(num_running_reqs=0, num_waiting_reqs=0, num_skipped_waiting_reqs=0, kv_cache_usage=0.0,
                       prefix_cache_stats=SimpleNamespace(queries=0, hits=0))  # fmt: skip
BUSY = SimpleNamespace(num_running_reqs=8, num_waiting_reqs=3, num_skipped_waiting_reqs=1, kv_cache_usage=0.25,
                       prefix_cache_stats=SimpleNamespace(queries=100, hits=60))  # fmt: skip
REQUEST = SimpleNamespace(
    prompt_token_ids=[1] * 100, outputs=[SimpleNamespace(token_ids=[1] * 5), SimpleNamespace(token_ids=[1] * 3)]
)


def test_levels_are_the_last_and_counts_add_up():
    stats = EngineStats()
    for _ in range(2):
        stats.record(scheduler_stats=BUSY, iteration_stats=None, mm_cache_stats=SimpleNamespace(queries=2, hits=1))
        stats.finished(REQUEST)
    stats.record(scheduler_stats=IDLE, iteration_stats=None, mm_cache_stats=None)
    found = {series.name: value for (series, _), value in stats.read().items()}
    assert found == {
        "vllm_num_requests_running": 0, "vllm_num_requests_waiting": 0, "vllm_kv_cache_usage_perc": 0.0,
        "vllm_prompt_tokens": 200, "vllm_generation_tokens": 16,
        "vllm_prefix_cache_queries": 200, "vllm_prefix_cache_hits": 120,
        "vllm_mm_cache_queries": 4, "vllm_mm_cache_hits": 2,
    }  # fmt: skip
    stats.record(scheduler_stats=BUSY, iteration_stats=None)
    assert stats.read()[engine_stats.WAITING, ""] == 4
