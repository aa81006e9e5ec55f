"""vLLM's own senders for GPUs, NCCL and CUDA IPC, fed by `PolicyWeights`.

`PolicyWeights` casts the FP32 masters to BF16; vLLM's `ModuleSource` would send the masters.

vLLM's senders call a client, which should call the generators. Here the driver calls the generators. NCCL's payloads
are known in advance, so the driver starts `load_weights` together with the broadcast. IPC's payloads are made while it
sends, so the client forwards them.
"""

import socket
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from rft_cluster.weights.sender import Forward, WeightOffer
from rft_cluster.weights.source import PolicyWeights


class Client:
    """The client of vLLM's senders. Three methods are empty, because the driver makes these calls itself."""

    def __init__(self, forward: Forward | None = None) -> None:
        self._forward = forward

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self._forward:
            self._forward(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


class NCCLSender:
    """vLLM's NCCL sender. Learner rank 0 is rank 0 of a group with the workers of all generators."""

    def __init__(self, source: PolicyWeights, address: str) -> None:
        """`address`: address of this rank's host."""
        self._source, self._address = source, address
        self._engine: Any = None

    def offer(self, generator_ranks: int) -> WeightOffer:
        """Offer a new port each time: after a generator was replaced, a new group is formed."""
        from vllm.distributed.weight_transfer import nccl_common, nccl_engine

        rank = dist.get_rank()
        port = 0 if rank else free_port(self._address)
        info = nccl_engine.NCCLTrainerInitInfo(
            rank=rank, master_address=self._address, master_port=port, world_size=1 + generator_ranks
        )
        self._info = info
        # The payload that vLLM's sender would give its client. A test compares the two.
        init = nccl_common.NCCLWeightTransferInitInfo(
            master_address=info.master_address,
            master_port=info.master_port,
            rank_offset=1,
            world_size=info.world_size,
            packed=info.packed,
            packed_buffer_size_bytes=info.packed_buffer_size_bytes,
            packed_num_buffers=info.packed_num_buffers,
        )
        tensors = self._source.metadata()
        update = nccl_engine.NCCLWeightTransferUpdateInfo(
            names=[tensor.name for tensor in tensors],
            dtype_names=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            shapes=[list(tensor.shape) for tensor in tensors],
        )
        return WeightOffer(nccl_common.worker_init_payload(init), asdict(update), self._source.nbytes)

    def connect(self, forward: Forward | None) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        if self._engine:
            self._engine.shutdown()
        # vLLM's `set_stream`, in place of torch's, remembers this thread's stream. If it knows none, it makes one and
        # sets it for good: the learner would compute there, while its batches are copied on the default stream.
        torch.cuda.set_stream(torch.cuda.current_stream())
        self._engine = WeightTransferTrainerFactory.trainer_init(self._info, client=Client(), source=self._source)

    def send(self) -> None:
        # vLLM packs on streams of its own, which do not wait for the optimizer's kernels on this one.
        torch.cuda.current_stream().synchronize()
        self._engine.send_weights()
        # PyTorch keeps freed memory by stream. What vLLM's streams had, 4 GiB at most, is for the next update.
        torch.cuda.empty_cache()

    def digests(self) -> dict[str, int]:
        return self._source.digests()


class IPCSender:
    """vLLM's CUDA IPC sender, with chunks of bounded size, for generators on the learners' GPUs."""

    def __init__(self, source: PolicyWeights) -> None:
        self._source = source

    def offer(self, generator_ranks: int) -> WeightOffer:
        return WeightOffer({"packed": True}, None, self._source.nbytes)

    def connect(self, forward: Forward | None) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

        # A chunk has whole tensors. The 7B's embedding takes 1.02 GiB, more than vLLM's default of 1 GiB.
        largest = max(tensor.nbytes for tensor in self._source.metadata())
        size = max(DEFAULT_PACKED_BUFFER_SIZE_BYTES, largest)
        info = IPCTrainerInitInfo(rank=dist.get_rank(), packed=True, packed_buffer_size_bytes=size)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=Client(forward), source=self._source)

    def send(self) -> None:
        self._engine.send_weights()

    def digests(self) -> dict[str, int]:
        return self._source.digests()


def nccl_init_infos(init_info: dict[str, Any], tensor_parallel_sizes: list[int]) -> list[dict[str, Any]]:
    """The init payload of vLLM's workers for each generator, derived from the sender's.

    The sender is rank 0 of the transfer group. Every engine counts its workers from 0, so each generator needs its own
    `rank_offset`; vLLM's own Ray client gives all of them the same.
    """
    infos, offset = [], 1
    for size in tensor_parallel_sizes:
        infos.append({**init_info, "rank_offset": offset})
        offset += size
    if offset != init_info["world_size"]:
        raise ValueError(f"the transfer group has {init_info['world_size']} ranks, but {offset} take part")
    return infos


def free_port(address: str) -> int:
    """A port that is currently free on this host."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
