"""What differs between a CPU box and GPUs, each difference named once, here."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Hardware:
    """`transfer` is the backend that carries the weights; `attention` names the learner's implementation for each part
    of the model, as transformers takes it (the text's are in `shared_prefix.py`)."""

    device: str
    process_group: str
    transfer: str
    attention: dict[str, str]


def hardware(device: str, shares_gpus: bool = False) -> Hardware:
    """The differences for a device, `"cpu"` or `"cuda"`; `shares_gpus`: a generator and a learner on one GPU."""
    if device == "cpu":
        return Hardware("cpu", "gloo", "shared_memory", {"text_config": "shared_prefix_sdpa", "vision_config": "sdpa"})
    # gloo beside nccl: checkpoints and weight digests are gathered from CPU tensors.
    vision = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    attention = {"text_config": "shared_prefix_varlen", "vision_config": vision}
    return Hardware("cuda", "cpu:gloo,cuda:nccl", "ipc" if shares_gpus else "nccl", attention)


def openmp_environment(device: str) -> dict[str, str]:
    """What a process needs in its environment from the start: on CPUs Intel's OpenMP runtime, where it is installed.

    Without it the CPU build of vLLM was seen to take 1.7 to 52 s for the same batch.
    """
    runtime = Path(sys.prefix) / "lib" / "libiomp5.so"
    return {"LD_PRELOAD": str(runtime), "KMP_BLOCKTIME": "0"} if device == "cpu" and runtime.is_file() else {}
