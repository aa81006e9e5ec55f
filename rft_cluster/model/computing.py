"""What each process sets up before it computes with a model in torch."""

import torch

from rft_cluster.common.hardware import forget_openmp


def set_up_torch(threads: int | None) -> None:
    """Call it once, before the first tensor. `threads`: None for torch's own choice."""
    if threads:
        torch.set_num_threads(threads)
    forget_openmp()
    torch.set_flush_denormal(True)  # denormals slow a small model tenfold on CPUs
