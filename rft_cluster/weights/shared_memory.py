"""The sender for CPUs: shared memory that generators on the same host map."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.sender import Forward, WeightOffer
from rft_cluster.weights.source import WIRE_DTYPE, PolicyWeights, TensorInfo

ALIGNMENT = 64  # bytes; a tensor in shared memory starts at a multiple of it


@dataclass(frozen=True)
class SharedMemoryLayout:
    """The offset of each tensor in the memory, in bytes."""

    names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int


def memory_layout(infos: Sequence[TensorInfo]) -> SharedMemoryLayout:
    """Put one tensor after the other, each at a multiple of `ALIGNMENT`."""
    sizes = [-(-info.nbytes // ALIGNMENT) * ALIGNMENT for info in infos]
    *offsets, end = accumulate(sizes, initial=0)
    return SharedMemoryLayout([info.name for info in infos], [list(info.shape) for info in infos], offsets, end)


class SharedMemorySender:
    """Sends through shared memory. Generators on the same host map it; other hosts get a copy of its contents.

    If all ranks are on one host, each casts its own shard into the memory and nothing is gathered. Otherwise rank 0
    writes everything. The driver calls `send` again only when the generators have verified the weights.

    The memory is a memfd. Other processes of the user open it under /proc. It is freed with its creator, so a crash
    leaves nothing in /dev/shm (which containers often limit to 64 MB).
    """

    def __init__(self, source: PolicyWeights, one_host: bool) -> None:
        """A collective: all ranks make their senders at the same time."""
        self._source, self._one_host = source, one_host
        infos = source.metadata()
        layout = memory_layout(infos)
        rank = dist.get_rank()
        path: list[str | None] = [None]
        if rank == 0:
            self._file = os.memfd_create("rft_cluster_weights")
            os.ftruncate(self._file, layout.nbytes)
            path = [f"/proc/{os.getpid()}/fd/{self._file}"]
        dist.broadcast_object_list(path, src=0)
        assert path[0] is not None
        self._offer = WeightOffer(asdict(layout), {"path": path[0], "nbytes": layout.nbytes}, source.nbytes)
        self._writes = one_host or rank == 0
        self._tensors: dict[str, Tensor] = {}  # flat views into the memory
        self._runs: dict[str, tuple[Tensor, int]] = {}  # this rank's part of each, and the index of its first element
        if self._writes:
            if rank != 0:
                self._file = os.open(path[0], os.O_RDWR)
            self._memory = mmap.mmap(self._file, layout.nbytes)
            for info, offset in zip(infos, layout.offsets, strict=True):
                count = info.nbytes // WIRE_DTYPE.itemsize
                self._tensors[info.name] = torch.frombuffer(self._memory, dtype=WIRE_DTYPE, count=count, offset=offset)

    def offer(self, generator_ranks: int) -> WeightOffer:
        return self._offer

    def connect(self, forward: Forward | None) -> None:
        pass

    def send(self) -> None:
        """Write this rank's part. The memory is complete when all ranks have returned."""
        whole = ((name, tensor, 0) for name, tensor in self._source)
        self._runs = {}
        for name, rows, start in self._source.local_rows() if self._one_host else whole:
            if self._writes:
                run = self._tensors[name][start : start + rows.numel()]
                run.copy_(rows.reshape(-1))  # casts to BF16
                self._runs[name] = (run, start)

    def digests(self) -> dict[str, int]:
        """Digests of this rank's part, read from the memory."""
        return {name: tensor_digest(*run) for name, run in self._runs.items()}

    def contents(self) -> np.ndarray:
        """All bytes of the memory, [bytes] uint8, without a copy; on rank 0."""
        return np.frombuffer(self._memory, dtype=np.uint8)
