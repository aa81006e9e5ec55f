"""What each process sets up before it computes with a model in torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.common.hardware import forget_openmp

NO_MEMORY = ("out of memory", "can't allocate memory")  # in messages of CUDA, and of CPUs' allocators


def set_up_torch(threads: int | None) -> None:
    """Call it once, before the first tensor. `threads`: None for torch's own choice."""
    if threads:
        torch.set_num_threads(threads)
    forget_openmp()
    torch.set_flush_denormal(True)  # denormals slow a small model tenfold on CPUs


def device_here() -> str:
    """`"cuda"` on a machine with a GPU, else `"cpu"`. For commands without a configuration."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_built_for_gpus() -> bool:
    """Whether this torch is the one of the extra `gpu`."""
    return torch.version.cuda is not None


def free_memory() -> tuple[int, int]:
    """(bytes of the GPU's memory that no process has, all bytes)."""
    free, total = torch.cuda.mem_get_info()
    return free, total


@contextmanager
def within_memory(who: str, cure: str = "") -> Iterator[None]:
    """Turn errors about too little memory within this context into UserError, on GPUs and CPUs.

    A GPU's allocator has an exception of its own, CUDA another if even its context has no room, and CPUs' allocators
    raise a plain RuntimeError; all are RuntimeErrors.
    """
    try:
        yield
    except ClusterError:  # also a RuntimeError; another actor was lost, perhaps for want of memory, and can be replaced
        raise
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)):
            raise
        said = f"{who} is out of memory ({str(error).splitlines()[0]})"
        raise UserError(f"{said}: {cure}" if cure else said) from error
