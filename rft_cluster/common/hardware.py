"""What differs between a CPU box and GPUs, each difference named once, here."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# As the kernel names them: Intel's and AMD's, and ARM's.
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Hardware:
    """`dtype` is what layers compute in, torch's name of it; `transfer` is the backend that carries the weights;
    `attention` names the learner's implementation for each part of the model, as transformers takes it (the text's are
    in `model/shared_prefix.py`)."""

    device: str
    dtype: str
    process_group: str
    transfer: str
    attention: dict[str, str]


def native_dtype(device: str, cpuinfo: str | None = None) -> str:
    """BF16 where the device computes in it, else FP32. `cpuinfo`: the text of /proc/cpuinfo, left out: this machine's.

    Processors without BF16 instructions (laptops', and servers' of some years ago) do it far from peak: forward and
    backward of a linear layer took 6 to 43 times as long as in FP32 on one with AVX2.
    """
    text = cpuinfo if cpuinfo is not None else CPUINFO.read_text() if CPUINFO.is_file() else ""
    return "bfloat16" if device == "cuda" or BF16_INSTRUCTIONS & set(text.split()) else "float32"


def hardware(device: str, dtype: str | None = None, shares_gpus: bool = False) -> Hardware:
    """The differences for a device, `"cpu"` or `"cuda"`; `shares_gpus`: a generator and a learner on one GPU."""
    dtype = dtype or native_dtype(device)
    if device == "cpu":
        attention = {"text_config": "shared_prefix_sdpa", "vision_config": "sdpa"}
        return Hardware("cpu", dtype, "gloo", "shared_memory", attention)
    # gloo beside nccl: checkpoints and weight digests are gathered from CPU tensors.
    vision = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    attention = {"text_config": "shared_prefix_varlen", "vision_config": vision}
    return Hardware("cuda", dtype, "cpu:gloo,cuda:nccl", "ipc" if shares_gpus else "nccl", attention)


def openmp_environment(device: str) -> dict[str, str]:
    """What a process needs in its environment from the start: on CPUs Intel's OpenMP runtime, where it is installed.

    Without it the CPU build of vLLM was seen to take 1.7 to 52 s for the same batch.
    """
    runtime = Path(sys.prefix) / "lib" / "libiomp5.so"
    return {"LD_PRELOAD": str(runtime), "KMP_BLOCKTIME": "0"} if device == "cpu" and runtime.is_file() else {}
