"""The differences between CPUs and GPUs, each named once."""

import os
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# CPU flags in the kernel's spelling: Intel and AMD, then ARM.
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Hardware:
    """How to compute on a device.

    `dtype`: torch's name of the type that layers compute in.
    `transfer`: backend of the weight transfer.
    `attention`: the learner's attention implementation by part of the model, in transformers' form; those for text are
    in `model/shared_prefix.py`, a CPU's for vision in `model/matrix_attention.py`.
    """

    device: str
    dtype: str
    process_group: str
    transfer: str
    attention: dict[str, str]


def native_dtype(device: str, cpuinfo: str | None = None) -> str:
    """The fastest dtype: "bfloat16" with BF16 instructions, else "float32". `cpuinfo`: text of /proc/cpuinfo.

    Processors without BF16 instructions (laptops, servers of some years ago) emulate BF16 slowly: on one with AVX2,
    forward and backward of a linear layer took 6 to 43 times as long as in FP32.
    """
    text = cpuinfo if cpuinfo is not None else CPUINFO.read_text() if CPUINFO.is_file() else ""
    return "bfloat16" if device == "cuda" or BF16_INSTRUCTIONS & set(text.split()) else "float32"


def cpu_facts() -> dict[str, str]:
    """What the system says about a core, e.g. "model name" and "flags"; empty if it says nothing."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def hardware(device: str, dtype: str | None = None, shares_gpus: bool = False) -> Hardware:
    """The settings for `device`, `"cpu"` or `"cuda"`. `shares_gpus`: a generator and a learner share each GPU."""
    dtype = dtype or native_dtype(device)
    if device == "cpu":
        attention = {"text_config": "shared_prefix_sdpa", "vision_config": "matrix_or_sdpa"}
        return Hardware("cpu", dtype, "gloo", "shared_memory", attention)
    # gloo in addition to nccl: checkpoints and weight digests are gathered from CPU tensors.
    # By the distribution's name: flash-attn-4 also brings a package flash_attn, which transformers refuses.
    vision = "flash_attention_2" if any(distributions(name="flash-attn")) else "sdpa"
    attention = {"text_config": "shared_prefix_varlen", "vision_config": vision}
    return Hardware("cuda", dtype, "cpu:gloo,cuda:nccl", "ipc" if shares_gpus else "nccl", attention)


def openmp_environment(device: str) -> dict[str, str]:
    """Environment variables that a process needs at its start: on CPUs Intel's OpenMP runtime, if installed.

    Without that runtime, vLLM's CPU build took between 1.7 and 52 s for the same batch.
    """
    runtime = Path(sys.prefix) / "lib" / "libiomp5.so"
    return {**preloaded(runtime), "KMP_BLOCKTIME": "0"} if device == "cpu" and runtime.is_file() else {}


def preloaded(library: Path) -> dict[str, str]:
    """Environment variables with which a process loads a library before all others.

    The loader takes a space in LD_PRELOAD for the next path. A name alone is searched in LD_LIBRARY_PATH, where only
    colons and semicolons divide.
    """
    if " " not in str(library):
        return {"LD_PRELOAD": str(library)}
    folders = filter(None, (str(library.parent), os.environ.get("LD_LIBRARY_PATH")))
    return {"LD_PRELOAD": library.name, "LD_LIBRARY_PATH": ":".join(folders)}


def forget_openmp() -> None:
    """Remove the note that Intel's OpenMP runtime makes of this process in /dev/shm; call it after torch is imported.

    The runtime removes the note at the end of a process, but not of one that is killed. The note is only there to find
    a second copy of the runtime in the process.
    """
    Path(f"/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}").unlink(missing_ok=True)


def malloc_environment(device: str) -> dict[str, str]:
    """Environment variables with which a process on CPUs keeps freed memory for its next tensors.

    New pages from the system took 8 % of a learner's forward and backward, and as much time as vLLM's packing of
    matrices. The peak of memory was the same.
    """
    keep = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
    return keep if device == "cpu" else {}
