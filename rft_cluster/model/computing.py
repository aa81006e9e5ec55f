"""What each process sets up before it computes with a model in torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rft_cluster.common.errors import UserError
from rft_cluster.common.hardware import forget_openmp


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


def free_share() -> float:
    """The part of the GPU's memory that no process has."""
    free, total = torch.cuda.mem_get_info()
    return float(free / total)


@contextmanager
def within_memory(who: str) -> Iterator[None]:
    """Turn an error about too little of a GPU's memory within this context into UserError. `who` has none left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{who} is out of memory: {str(error).splitlines()[0]}") from error
