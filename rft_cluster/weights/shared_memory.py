"""The sender for CPUs: through memory that generators on the same host map."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rft_cluster.weights.client import VersioningClient
from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.source import WIRE_DTYPE, PolicyWeights, TensorInfo, added_up

ALIGNMENT = 64  # bytes; a tensor in shared memory starts at a multiple of it


@dataclass(frozen=True)
class SharedMemoryLayout:
    """Where a generator finds each tensor, in bytes from the start of the memory."""

    names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int


def memory_layout(infos: Sequence[TensorInfo]) -> SharedMemoryLayout:
    """Every tensor at a multiple of `ALIGNMENT`, matrices first.

    An engine fuses some matrices (query, key and value, say). Without the biases between them they are one run of
    memory, which it can pack as it is.
    """
    offsets, end = {}, 0
    for info in sorted(infos, key=lambda info: len(info.shape) == 1):
        offsets[info.name] = end
        end += -(-info.nbytes // ALIGNMENT) * ALIGNMENT
    names = [info.name for info in infos]
    return SharedMemoryLayout(names, [list(info.shape) for info in infos], [offsets[name] for name in names], end)


class SharedMemorySender:
    """Sends through memory that generators on the same host map (the client carries it to other hosts).

    Each rank casts its own shard into it and nothing is gathered, where all ranks are on one host; else rank 0 writes
    all. Nobody writes before the generators have proved what they read (`WeightBroadcast.send` waits).

    The memory is a memfd: other processes of the user open it under /proc, and it goes with its creator, so a
    crash leaves nothing in /dev/shm (which containers often limit to 64 MB).
    """

    def __init__(self, client: VersioningClient, source: PolicyWeights, one_host: bool) -> None:
        self._client, self._source, self._one_host = client, source, one_host
        self._rank = dist.get_rank()
        # The proof runs in a thread of its own: its collective must not fall among those of the training.
        self._group = dist.new_group(backend="gloo")
        infos = source.metadata()
        layout = memory_layout(infos)
        self._names = layout.names
        path: list[str | None] = [None]
        if self._rank == 0:
            self._file = os.memfd_create("rft_cluster_weights")
            os.ftruncate(self._file, layout.nbytes)
            path = [f"/proc/{os.getpid()}/fd/{self._file}"]
        dist.broadcast_object_list(path, src=0)
        assert path[0] is not None
        self._update = {"path": path[0], "nbytes": layout.nbytes}
        self._writes = one_host or self._rank == 0
        self._tensors: dict[str, Tensor] = {}  # flat, in the memory
        self._runs: dict[str, tuple[Tensor, int]] = {}  # this rank's part of each, and its first element's position
        if self._writes:
            if self._rank != 0:
                self._file = os.open(path[0], os.O_RDWR)
            self._memory = mmap.mmap(self._file, layout.nbytes)
            for info, offset in zip(infos, layout.offsets, strict=True):
                count = info.nbytes // WIRE_DTYPE.itemsize
                self._tensors[info.name] = torch.frombuffer(self._memory, dtype=WIRE_DTYPE, count=count, offset=offset)
        if self._rank == 0:
            client.init_weight_transfer_engine(asdict(layout))

    def send_weights(self) -> None:
        whole = ((name, tensor, 0) for name, tensor in self._source)
        self._runs = {}
        for name, rows, start in self._source.local_rows() if self._one_host else whole:
            if self._writes:
                run = self._tensors[name][start : start + rows.numel()]
                run.copy_(rows.reshape(-1))  # casts on the way
                self._runs[name] = (run, start)
        dist.barrier()  # all shards are written
        if self._rank == 0:
            self._client.load_weights(self._update)
        dist.barrier()

    def prove(self) -> None:
        """Have the generators compare what they received with what was written here; a collective.

        Raises:
            WeightTransferError: on rank 0, if they differ.
        """
        own = {name: tensor_digest(*self._runs[name]) if name in self._runs else 0 for name in self._names}
        digests = added_up(own, self._group)
        try:
            if self._rank == 0:
                self._client.prove(digests)
        finally:
            dist.barrier(self._group)  # no rank writes before all generators have read

    def shutdown(self) -> None:
        dist.destroy_process_group(self._group)
        if self._writes:
            self._tensors, self._runs = {}, {}
            self._memory.close()
            os.close(self._file)
