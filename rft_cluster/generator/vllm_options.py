"""vLLM's options, chosen so that versions, log-probabilities and seeds of completions are right."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.common.hardware import Hardware, forget_openmp, hardware, malloc_environment
from rft_cluster.common.imports import light_imports
from rft_cluster.config import Config, GeneratorsSection, ModelSection
from rft_cluster.messages import Sampling

# vLLM reads these on import. The engine runs in this process, with this process's number of threads.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # No request here can take FlashInfer's sampler, which has neither seeds nor log-probabilities. To find out whether
    # it could be used, an engine would import FlashInfer and compile for the GPU.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
CPU_ENVIRONMENT = {
    # Do not compile two small functions of vLLM's sampler: inductor would need a C++ compiler, Python's headers and
    # seconds of every start, for the same result.
    "TORCHDYNAMO_DISABLE": "1",
}
# Words in vLLM's and the allocators' messages about too little memory.
MEMORY = re.compile(
    r"available memory|KV cache|GPU memory utilization|out of memory|allocate memory|memory profiling", re.IGNORECASE
)
MM_CACHE_GIB = 1.0
CPU_BATCHED_TOKENS = 8192
FORBIDDEN_BIAS = -100.0  # vLLM's minimum; a token with exp(-100) is never sampled


@dataclass(frozen=True)
class EngineOptions:
    """The settings of a generator's engine.

    `path`: Hugging Face folder with the initial weights. `max_tokens`: of prompt and completion together. `timeout`:
    seconds for a weight update, and for its verification; None where weights are never updated.
    """

    path: str
    model: ModelSection
    generators: GeneratorsSection
    max_tokens: int
    hardware: Hardware
    seed: int
    timeout: float | None = None

    @classmethod
    def of_run(cls, path: str, config: Config) -> "EngineOptions":
        cluster = config.cluster
        devices = hardware(cluster.device, cluster.dtype, config.shares_gpus)
        own = (config.max_model_tokens, devices, config.run.seed, cluster.step_timeout)
        return cls(path, config.model, config.generators, *own)


def environment(device: str) -> dict[str, str]:
    """Environment variables that a generator's process needs at its start."""
    return ENVIRONMENT | malloc_environment(device) | (CPU_ENVIRONMENT if device == "cpu" else {})


@contextmanager
def within_memory() -> Iterator[None]:
    """Turn vLLM's errors about too little memory within this context into UserError.

    vLLM raises a plain ValueError or RuntimeError for them, or AssertionError if others give memory back meanwhile; a
    GPU's allocator has its own exception.
    """
    try:
        yield
    except ClusterError:  # also a RuntimeError; an actor was lost, perhaps for want of memory, and can be replaced
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        if not MEMORY.search(str(error)):
            raise
        raise UserError(
            f"a generator is out of memory ({str(error).strip().splitlines()[0]}): lower sampling.max_tokens, "
            f"model.max_prompt_tokens or generators.max_concurrent; on CPUs raise generators.kv_cache_gib, on GPUs "
            f"free memory of other processes, or set generators.gpu_memory to the free share"
        ) from error


def load_engine(options: EngineOptions, image_limits: dict[str, Any]) -> Any:
    """Load a `vllm.LLM` with the weights of `options.path`. Call this before vLLM is imported.

    `image_limits`: for the image processor (`PromptEncoder.image_limits`).
    """
    config, devices, max_tokens = options.generators, options.hardware, options.max_tokens
    tensor_parallel = max(1, int(config.gpus))
    os.environ.update(environment(devices.device))  # for a process that was started without it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Hide what vLLM prints on every start: Triton has no CPU backend, and warnings about deprecated torch attributes.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    with light_imports():
        from vllm import LLM

        from rft_cluster.weights import receivers

    forget_openmp()
    receivers.register()
    with within_memory(), light_imports():  # the start of the engine imports much more
        engine = LLM(
            model=options.path,
            dtype=devices.dtype,
            seed=options.seed,
            max_model_len=max_tokens,
            max_num_seqs=config.max_concurrent,
            tensor_parallel_size=tensor_parallel,
            # vLLM's default for several workers in a placement group are Ray actors, one a bundle: it would refuse this
            # actor's bundle, which has all GPUs of the engine.
            distributed_executor_backend="mp" if tensor_parallel > 1 else "uni",
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs=image_limits,
            mm_processor_cache_gb=MM_CACHE_GIB,
            enable_prefix_caching=True,
            # Log-probabilities of the distribution that is sampled: restricted and tempered.
            logprobs_mode="processed_logprobs",
            # Ignore the checkpoint's generation_config: Qwen2-VL's has top_k 1.
            generation_config="vllm",
            weight_transfer_config={"backend": receivers.ENGINES[devices.transfer]},
            trust_remote_code=options.model.trust_remote_code,
            disable_log_stats=False,  # for EngineStats
            **_by_device(options),
        )
    # Hide a message at every prompt about the number of threads. Set here because the engine's start resets log levels.
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
    return engine


def _by_device(options: EngineOptions) -> dict[str, Any]:
    """Options of `vllm.LLM` that CPUs and GPUs do not share."""
    if options.hardware.device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.generators.kv_cache_gib)
        # Chunked prefill rewinds a prompt's random generator, which CPU generators cannot do ("CPU Generator does not
        # use offset"). So prefill each prompt in one piece.
        batched = max(options.max_tokens, CPU_BATCHED_TOKENS)
        return {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": batched}
    return {
        "gpu_memory_utilization": options.generators.gpu_memory,
        "enable_sleep_mode": options.hardware.transfer == "ipc",
        # None of these models' operators is FlashInfer's. Where a CUDA toolkit is installed, vLLM would import
        # FlashInfer and time its kernels at each start.
        "kernel_config": {"enable_flashinfer_autotune": False},
    }


def sampling_params(sampling: Sampling, seed: int, stop_token_ids: list[int], forbidden_token_ids: list[int]) -> Any:
    """Make vLLM's `SamplingParams`. Every parameter that shapes the distribution is set, so no default applies."""
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
        logprobs=0,  # only of the sampled token
        logit_bias=dict.fromkeys(forbidden_token_ids, FORBIDDEN_BIAS),
        skip_special_tokens=True,
        output_kind=RequestOutputKind.FINAL_ONLY,  # one output with the whole group, when its last completion is done
    )
