"""What vLLM is told: an engine with which a generator's promises can be kept (versions, log-probabilities, seeds)."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rft_cluster.common.errors import UserError
from rft_cluster.common.hardware import Hardware, hardware
from rft_cluster.common.imports import light_imports
from rft_cluster.config import Config, GeneratorsSection, ModelSection
from rft_cluster.messages import Sampling

# Read by vLLM when it is imported; the engine lives in this process, on the threads that this process has.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ENVIRONMENT = {
    # An update replaces all packed weights, matrix by matrix. Freed memory stays with the process, for the next of its
    # size: pages that come back from the system cost as much as packing does.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    # vLLM's sampler has two small functions compiled by torch's inductor, which needs a C++ compiler and Python's
    # headers, and seconds of every start. As they are written they compute the same.
    "TORCHDYNAMO_DISABLE": "1",
}
# How vLLM and allocators say that memory is short.
MEMORY = re.compile(r"available memory|KV cache|GPU memory utilization|out of memory|allocate memory", re.IGNORECASE)
MM_CACHE_GIB = 1.0
CPU_BATCHED_TOKENS = 8192
FORBIDDEN_BIAS = -100.0  # the lowest that vLLM takes: exp(-100) is never sampled


@dataclass(frozen=True)
class EngineOptions:
    """All that a generator's engine depends on.

    `path` is a Hugging Face folder with the first weights, `max_tokens` what prompt and completion take together.
    """

    path: str
    model: ModelSection
    generators: GeneratorsSection
    max_tokens: int
    hardware: Hardware
    seed: int

    @classmethod
    def of_run(cls, path: str, config: Config) -> "EngineOptions":
        cluster = config.cluster
        devices = hardware(cluster.device, cluster.dtype, config.shares_gpus)
        return cls(path, config.model, config.generators, config.max_model_tokens, devices, config.run.seed)


def environment(device: str) -> dict[str, str]:
    """What a generator's process needs in its environment from the start."""
    return ENVIRONMENT | (CPU_ENVIRONMENT if device == "cpu" else {})


def device_here() -> str:
    """`"cuda"` on a machine with a GPU, else `"cpu"`, for who has no configuration that says it."""
    import torch  # takes seconds to import

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def within_memory() -> Iterator[None]:
    """Raises UserError where vLLM says in here that weights or keys and values find no room: all it raises then are a
    ValueError or a RuntimeError (a GPU's allocator has one of its own)."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not MEMORY.search(str(error)):
            raise
        raise UserError(
            f"a generator is out of memory ({str(error).strip().splitlines()[0]}): lower sampling.max_tokens, "
            f"model.max_prompt_tokens or generators.max_concurrent; on CPUs raise generators.kv_cache_gib, on GPUs set "
            f"generators.gpu_memory to what is free"
        ) from error


def load_engine(options: EngineOptions, image_limits: dict[str, Any]) -> Any:
    """A `vllm.LLM` with the weights of `options.path`. To be called before vLLM is imported.

    `image_limits` go to its image processor (`PromptEncoder.image_limits`).
    """
    config, devices, max_tokens = options.generators, options.hardware, options.max_tokens
    os.environ.update(environment(devices.device))  # for an engine in a process that was started without it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    by_device: dict[str, Any] = {
        "gpu_memory_utilization": config.gpu_memory,
        "enable_sleep_mode": devices.transfer == "ipc",
    }
    if devices.device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
        # A prompt whose prefill is cut in chunks rewinds its random generator, which CPU generators cannot
        # ("CPU Generator does not use offset"): a prompt is prefilled whole.
        batched = max(max_tokens, CPU_BATCHED_TOKENS)
        by_device = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": batched,
        }
    # vLLM says on every start that Triton has no backend for CPUs, and looks at attributes that torch deprecates.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    with light_imports():
        from vllm import LLM

        from rft_cluster.weights import receivers

    receivers.register()
    with within_memory(), light_imports():  # it imports as much again
        engine = LLM(
            model=options.path,
            dtype=devices.dtype,
            seed=options.seed,
            max_model_len=max_tokens,
            max_num_seqs=config.max_concurrent,
            tensor_parallel_size=max(1, int(config.gpus)),
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs=image_limits,
            mm_processor_cache_gb=MM_CACHE_GIB,
            enable_prefix_caching=True,
            # Sampled from a restricted, tempered distribution, so its log-probabilities are the right ones.
            logprobs_mode="processed_logprobs",
            # A checkpoint's generation_config (Qwen2-VL carries top_k 1) must not leak into sampling.
            generation_config="vllm",
            weight_transfer_config={"backend": receivers.ENGINES[devices.transfer]},
            trust_remote_code=options.model.trust_remote_code,
            disable_log_stats=True,
            **by_device,
        )
    # At every prompt it would say that the number of threads stays as it is. (The engine's start sets levels anew.)
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
    return engine


def sampling_params(sampling: Sampling, seed: int, stop_token_ids: list[int], forbidden_token_ids: list[int]) -> Any:
    """vLLM's `SamplingParams`. Every one that shapes the distribution is named: none comes from a default elsewhere."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.group_size,
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=sampling.top_k,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=stop_token_ids,
        logprobs=0,  # of the sampled token alone
        logit_bias=dict.fromkeys(forbidden_token_ids, FORBIDDEN_BIAS),
        skip_special_tokens=True,
        output_kind=RequestOutputKind.FINAL_ONLY,  # a group comes whole, when its last completion is done
    )
