"""The learners' end of the weight transfer, and the proof that it arrived. The other end is `receivers.py`.

    learner ranks                          client (calls all generators)       each generator's engine
    tensors: shared memory --------------> load_weights(..., version) -------> loads and serves them
             NCCL / CUDA IPC ------------> start, update_weights(...) -------> loads them
                                           finish_weight_update(version) ----> serves them, and may generate
    digests of what was sent ------------> prove_weights(version, digests) --> compares with what it received;
                                                                               until they agree no group leaves it

The proof is off the clock: through shared memory it runs beside generation, and the memory belongs to the
generators until it is in. No update begins before that.

The interface is vLLM's: a sender has `trainer_init` and `send_weights` and drives a client of four methods. For
GPUs the sender is vLLM's own NCCL engine, fed by `PolicyWeights`, which casts the FP32 masters to BF16 (vLLM's
`ModuleSource` would ship the masters). For CPUs it is ours: every rank casts its own shard straight into memory
that the generators map; as it is all there before they load, one call to each is enough.
"""

import mmap
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.messages import WeightRecord
from rft_cluster.model.policy import PolicyModel
from rft_cluster.weights.digests import combined_digest, tensor_digest

WIRE_DTYPE = torch.bfloat16
ALIGNMENT = 64  # bytes; a tensor in shared memory starts at a multiple of it


class WeightClient(Protocol):
    """The generators as the sender sees them: each call reaches all of them and returns when all have answered."""

    ranks: int  # of all generators together: the sum of their tensor-parallel sizes

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str) -> None: ...

    def load_weights(self, update_info: dict[str, Any], weight_version: str) -> None: ...

    def prove_weights(self, weight_version: str, digests: dict[str, int]) -> list[WeightRecord]: ...


class WeightSender(Protocol):
    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on the wire: its checkpoint name, dtype and full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of one weight: the effective weight is `weight + scale * up @ down`."""

    down: Tensor  # [rank, in], perhaps sharded
    up: Tensor  # [out, rank], sharded as the weight is
    scale: float


class PolicyWeights:
    """The policy's weights as vLLM's `WeightSource`: full BF16 tensors, one after the other, without gathering
    more than one. Iteration is a collective: every rank iterates, in the same order.

    Adapters are merged on the way: generators and exports see an ordinary Qwen2-VL.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self._parameters: dict[str, tuple[Tensor, Adapter | None]] = {}
        for name, parameter in policy.model.named_parameters():  # a tied weight comes once
            if ".lora_" not in name:
                self._parameters[name.replace(".base_layer", "")] = (parameter, _adapter_of(policy, name))

    def metadata(self) -> list[TensorInfo]:
        return [TensorInfo(name, WIRE_DTYPE, tuple(p.shape)) for name, (p, _) in self._parameters.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for (name, (parameter, _)), (_, rows, _) in zip(self._parameters.items(), self.local_rows(), strict=True):
            rows = rows.to(WIRE_DTYPE)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = DTensor.from_local(
                    rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
                yield name, whole.full_tensor()
            else:
                yield name, rows

    def local_rows(self) -> Iterator[tuple[str, Tensor, int]]:
        """This rank's share: (name, rows, position of their first element in the flattened whole).

        Rows have the masters' dtype; FSDP2 shards the first dimension in even chunks, so that a shard is one run.
        """
        for name, (parameter, adapter) in self._parameters.items():
            if not isinstance(parameter, DTensor):
                yield name, _merged(parameter.detach(), adapter), 0
                continue
            rows, mesh = parameter.shape[0], parameter.device_mesh
            first_row = min(-(-rows // mesh.size()) * mesh.get_local_rank(), rows)
            # Offloaded weights are on the host; what carries them wants them where the ranks compute.
            local = parameter.detach().to_local().to(mesh.device_type)
            yield name, _merged(local, adapter), first_row * (parameter.numel() // rows)

    def digests(self) -> dict[str, int]:
        """The digest of every full BF16 tensor, the same on every rank; a collective of one small message."""
        sums = [tensor_digest(rows.to(WIRE_DTYPE), start) for _, rows, start in self.local_rows()]
        return added_up(dict(zip(self._parameters, sums, strict=True)))


def added_up(digests: dict[str, int], group: dist.ProcessGroup | None = None) -> dict[str, int]:
    """The digests of whole tensors from those of each rank's runs; every rank has all names, in the same order."""
    sums = torch.tensor(list(digests.values()), dtype=torch.int64)
    dist.all_reduce(sums, group=group)
    return dict(zip(digests, sums.tolist(), strict=True))


def _adapter_of(policy: PolicyModel, name: str) -> Adapter | None:
    """PEFT keeps an adapted layer's weight as `base_layer.weight`, its adapters beside it."""
    if not name.endswith(".base_layer.weight"):
        return None
    layer = policy.model.get_submodule(name.removesuffix(".base_layer.weight"))
    (adapter,) = layer.lora_A
    return Adapter(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])


def _merged(rows: Tensor, adapter: Adapter | None) -> Tensor:
    """Rows of a weight with its adapter in them: [rows, ...]."""
    if adapter is None:
        return rows
    down, up = adapter.down.detach(), adapter.up.detach()
    down = down.full_tensor() if isinstance(down, DTensor) else down
    up = up.to_local() if isinstance(up, DTensor) else up
    return rows.float() + adapter.scale * (up @ down).to(rows.device)


def check_records(records: list[WeightRecord], version: int, digest: int) -> None:
    """Is what the generators say they serve what was sent?

    Args:
        digest: combined digest of the tensors as they were sent.

    Raises:
        WeightTransferError: a generator reports another version, received other bytes, or holds other parameters
            than its peers; or none reports at all.
    """
    if not records:
        raise WeightTransferError(f"no generator reports that it serves version {version}")
    for index, record in enumerate(records):
        if record.version != version:
            raise WeightTransferError(f"generator {index} serves version {record.version} instead of {version}")
        if record.received != digest:
            raise WeightTransferError(f"generator {index} received other weights for version {version} than were sent")
        if record.loaded != records[0].loaded:
            raise WeightTransferError(f"generators 0 and {index} hold different parameters for version {version}")


class VersioningClient:
    """A client that gives each update its `version`: vLLM's senders know none."""

    def __init__(self, client: WeightClient) -> None:
        self._client = client
        self.ranks = client.ranks
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._client.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._client.finish_weight_update(weight_version or str(self.version))

    def load_weights(self, update_info: dict[str, Any]) -> None:
        self._client.load_weights(update_info, str(self.version))

    def prove(self, digests: dict[str, int]) -> None:
        """Hold what all generators received against what was sent.

        Raises:
            WeightTransferError: they differ.
        """
        records = self._client.prove_weights(str(self.version), digests)
        check_records(records, self.version, combined_digest(digests))


class WeightBroadcast:
    """One learner rank's part in sending weights. Every rank makes one and calls `send` at the same time."""

    def __init__(self, policy: PolicyModel, make_sender: Callable[..., WeightSender], client: WeightClient) -> None:
        self._weights = PolicyWeights(policy)
        self._client = VersioningClient(client)
        self._sender = make_sender(self._client, self._weights)
        self._thread = ThreadPoolExecutor(1, "proof")
        self._proof: Future[None] | None = None

    def send(self, version: int) -> None:
        """Bring all generators to `version`. They may generate when this returns; see `wait` for the proof.

        Raises:
            WeightTransferError: the update before this one was never proved, or this one failed.
        """
        self.wait()
        self._client.version = version
        self._sender.send_weights()
        if isinstance(self._sender, SharedMemorySender):
            self._proof = self._thread.submit(self._sender.prove)
        else:
            digests = self._weights.digests()
            if dist.get_rank() == 0:
                self._client.prove(digests)

    def wait(self) -> None:
        """Wait for the proof of the last update: from then on the memory that it went through is ours again.

        Raises:
            WeightTransferError: a generator found other bytes or names than were sent.
        """
        if self._proof:
            self._proof.result()

    def close(self) -> None:
        self._thread.shutdown()  # a proof that failed has told the generators' callers, who are gone
        self._sender.shutdown()


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
