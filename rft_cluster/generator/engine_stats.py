"""What a vLLM engine does, in numbers: nine of vLLM's own series.

vLLM's logger for Ray would import Ray Serve (over a second of each start, and a package more), and call Ray 40 times in
each step of the engine. This one adds up plain numbers there.
"""

from typing import Any

from rft_cluster.common.series import Series, Values


def _series(name: str, unit: str, meaning: str, counts: bool = True) -> Series:
    return Series(f"vllm_{name}", "counter" if counts else "gauge", unit, meaning)


RUNNING = _series("num_requests_running", "requests", "Requests in the engine's running batch.", counts=False)
WAITING = _series("num_requests_waiting", "requests", "Requests that wait in the engine.", counts=False)
CACHE_USE = _series("kv_cache_usage_perc", "share of 1", "KV cache in use.", counts=False)
PROMPT_TOKENS = _series("prompt_tokens", "tokens", "Prompt tokens of finished requests.")
TOKENS = _series("generation_tokens", "tokens", "Tokens sampled in finished requests, of evaluations too.")
PREFIX_ASKED = _series("prefix_cache_queries", "tokens", "Prompt tokens looked up in the prefix cache.")
PREFIX_FOUND = _series("prefix_cache_hits", "tokens", "Prompt tokens found in the prefix cache.")
IMAGES_ASKED = _series("mm_cache_queries", "images", "Images looked up in the cache of the processor.")
IMAGES_FOUND = _series("mm_cache_hits", "images", "Images found in the cache of the processor.")
ENGINE = (RUNNING, WAITING, CACHE_USE, PROMPT_TOKENS, TOKENS, PREFIX_ASKED, PREFIX_FOUND, IMAGES_ASKED,
          IMAGES_FOUND)  # fmt: skip
"""Names and meanings as in vLLM's PrometheusStatLogger, with `vllm_` for `vllm:`, which Ray's names may not have."""


class EngineStats:
    """Takes the place of vLLM's StatLoggerManager. Called on the engine's thread after each step, so quick."""

    def __init__(self) -> None:
        self._values: dict[Series, float] = dict.fromkeys(ENGINE, 0)

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None) -> None:
        """The arguments are vLLM's SchedulerStats and MultiModalCacheStats of one step, or None. `iteration_stats` is
        None here: they would take too long."""
        values = self._values
        if scheduler_stats is not None:
            values[RUNNING] = scheduler_stats.num_running_reqs
            values[WAITING] = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            values[CACHE_USE] = scheduler_stats.kv_cache_usage
            values[PREFIX_ASKED] += scheduler_stats.prefix_cache_stats.queries
            values[PREFIX_FOUND] += scheduler_stats.prefix_cache_stats.hits
        if mm_cache_stats is not None:
            values[IMAGES_ASKED] += mm_cache_stats.queries
            values[IMAGES_FOUND] += mm_cache_stats.hits

    def finished(self, output: Any) -> None:
        """A request is finished: vLLM's RequestOutput."""
        self._values[PROMPT_TOKENS] += len(output.prompt_token_ids)
        self._values[TOKENS] += sum(len(answer.token_ids) for answer in output.outputs)

    def log(self) -> None:
        """Asked of vLLM's loggers every 10 s: here somebody reads instead."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """The driver's phase says as much."""

    def read(self) -> Values:
        """Of any thread."""
        return {(series, ""): value for series, value in list(self._values.items())}
