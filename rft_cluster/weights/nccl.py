"""vLLM's own senders for GPUs, NCCL and CUDA IPC, over the policy's weights."""

import socket
from typing import Any

import torch.distributed as dist

from rft_cluster.weights.client import VersioningClient, WeightSender
from rft_cluster.weights.source import PolicyWeights


def nccl_init_infos(init_info: dict[str, Any], tensor_parallel_sizes: list[int]) -> list[dict[str, Any]]:
    """vLLM's worker init payload for each generator, from the one that its sender makes.

    The sender is rank 0 of the transfer group. Every in-process engine counts its own workers from 0, so each
    generator gets its own `rank_offset`; vLLM's own Ray client would give all of them the same.
    """
    infos, offset = [], 1
    for size in tensor_parallel_sizes:
        infos.append({**init_info, "rank_offset": offset})
        offset += size
    if offset != init_info["world_size"]:
        raise ValueError(f"the transfer group has {init_info['world_size']} ranks, but {offset} take part")
    return infos


def nccl_sender(client: VersioningClient, source: PolicyWeights, address: str, generator_ranks: int) -> WeightSender:
    """vLLM's NCCL sender over the policy's weights; learner rank 0 is rank 0 of the transfer group.

    Each call forms a new group on a new port, as it must when a generator was replaced.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    info = nccl_info(dist.get_rank(), address, free_port(address) if dist.get_rank() == 0 else 0, generator_ranks)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def nccl_info(rank: int, address: str, port: int, generator_ranks: int) -> Any:
    """vLLM's `NCCLTrainerInitInfo`: the sender and every generator's workers form one group."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=1 + generator_ranks)


def ipc_sender(client: VersioningClient, source: PolicyWeights) -> WeightSender:
    """vLLM's CUDA-IPC sender, in chunks of bounded size, for generators on the learners' own GPUs."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    info = IPCTrainerInitInfo(rank=dist.get_rank(), packed=True)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def free_port(address: str) -> int:
    """A port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
