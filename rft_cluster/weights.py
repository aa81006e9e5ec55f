"""The learners' end of the weight transfer, and the proof that it arrived. The other end is `receivers.py`.

    learner ranks                          client (calls all generators)            each generator's engine
    digest of every BF16 tensor  ----->    update_weights(names, digests, ...) -->  receives, recomputes digests
    tensors: shared memory / NCCL --------------------------------------------->    loads; refuses a mismatch
                                           finish_weight_update(version)       -->  version written and read back

The interface is vLLM's: a sender has `trainer_init` and `send_weights` and drives a client of four methods. For
GPUs the sender is vLLM's own NCCL engine, fed by `PolicyWeights`, which casts the FP32 masters to BF16 (vLLM's
`ModuleSource` would ship the masters). For CPUs it is ours: every rank casts its own shard straight into memory
that the generators map.

A digest is a sum over elements, so ranks add up the digests of their shards without gathering a tensor:

    digest(t) = sum_i bits(t_i) * (i + OFFSET)  mod 2^64        with i the position in the whole, flattened tensor
"""

import hashlib
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rft_cluster.messages import WeightRecord
from rft_cluster.qwen2vl import PolicyModel

WIRE_DTYPE = torch.bfloat16
DIGEST_OFFSET = 0x9E3779B97F4A7C15 - 2**64  # odd, large: small positions, too, change every bit of the sum
DIGEST_CHUNK = 1 << 16  # elements at once: what a core's cache holds as 64-bit integers
DIGEST_CHUNK_GPU = 1 << 24
ALIGNMENT = 64  # bytes; a tensor in shared memory starts at a multiple of it


class WeightTransferError(RuntimeError):
    """An update that did not arrive whole. The generator has no valid version and must not generate."""


class WeightClient(Protocol):
    """The generators as the sender sees them: each call reaches all of them and returns when all have answered."""

    ranks: int  # of all generators together: the sum of their tensor-parallel sizes

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> list[WeightRecord]: ...


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
class SharedMemoryUpdate:
    """What a generator needs to read an update: `path` is a file of `nbytes`, tensors at `offsets` in it."""

    path: str
    nbytes: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    digests: list[int]


def tensor_digest(tensor: Tensor, start: int = 0) -> int:
    """Digest of a BF16 tensor, or of a run of its elements from position `start`; runs' digests add up mod 2^64."""
    bits = tensor.contiguous().view(-1).view(torch.int16)
    chunk = DIGEST_CHUNK if bits.device.type == "cpu" else DIGEST_CHUNK_GPU
    ramp = torch.arange(min(chunk, bits.numel()), device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)  # sums and products wrap
    for first in range(0, bits.numel(), chunk):
        values = bits[first : first + chunk].long()
        total += (values * ramp[: len(values)]).sum() + values.sum() * (start + first + DIGEST_OFFSET)
    return int(total)


def wrap_int64(value: int) -> int:
    """An integer mod 2^64 as a signed 64-bit one, as tensor sums wrap."""
    return (value + 2**63) % 2**64 - 2**63


def combined_digest(digests: dict[str, int]) -> int:
    """One 64-bit number for named digests, whatever their order."""
    text = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


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
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = DTensor.from_local(
                    rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
                yield name, whole.full_tensor()
            else:
                yield name, rows

    def local_rows(self) -> Iterator[tuple[str, Tensor, int]]:
        """This rank's share: (name, BF16 rows, position of their first element in the flattened whole).

        FSDP2 shards the first dimension in even chunks, so that a shard is one run of elements.
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
        """The digest of every full tensor, the same on every rank; a collective of one small message."""
        sums = torch.tensor([tensor_digest(rows, start) for _, rows, start in self.local_rows()], dtype=torch.int64)
        dist.all_reduce(sums)
        return dict(zip(self._parameters, sums.tolist(), strict=True))


def _adapter_of(policy: PolicyModel, name: str) -> Adapter | None:
    """PEFT keeps an adapted layer's weight as `base_layer.weight`, its adapters beside it."""
    if not name.endswith(".base_layer.weight"):
        return None
    layer = policy.model.get_submodule(name.removesuffix(".base_layer.weight"))
    (adapter,) = layer.lora_A
    return Adapter(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])


def _merged(rows: Tensor, adapter: Adapter | None) -> Tensor:
    """Rows of a weight as they go onto the wire: [rows, ...] BF16."""
    if adapter is None:
        return rows.to(WIRE_DTYPE)
    down, up = adapter.down.detach(), adapter.up.detach()
    down = down.full_tensor() if isinstance(down, DTensor) else down
    up = up.to_local() if isinstance(up, DTensor) else up
    return (rows.float() + adapter.scale * (up @ down).to(rows.device)).to(WIRE_DTYPE)


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


class ProvingClient:
    """A client that adds to each update what its receiver needs to prove it, and checks what comes back.

    vLLM's senders know neither digests nor versions; they call the four methods and pass on their own fields.
    """

    def __init__(self, client: WeightClient) -> None:
        self._client = client
        self.ranks = client.ranks
        self._version = 0
        self._digests: dict[str, int] = {}

    def prepare(self, version: int, digests: dict[str, int]) -> None:
        """Set what the next update sends; `digests` by tensor name, in the order of sending."""
        self._version, self._digests = version, digests

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._client.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # A packed transfer comes in several calls, each with some of the names.
        digests = [self._digests[name] for name in update_info["names"]]
        self._client.update_weights({**update_info, "digests": digests})

    def finish_weight_update(self, weight_version: str | None = None) -> list[WeightRecord]:
        records = self._client.finish_weight_update(weight_version or str(self._version))
        check_records(records, self._version, combined_digest(self._digests))
        return records


class WeightBroadcast:
    """One learner rank's part in sending weights. Every rank makes one and calls `send` at the same time."""

    def __init__(self, policy: PolicyModel, make_sender: Callable[..., WeightSender], client: WeightClient) -> None:
        self._weights = PolicyWeights(policy)
        self._client = ProvingClient(client)
        self._sender = make_sender(self._client, self._weights)

    def send(self, version: int) -> int:
        """Bring all generators to `version`. Returns the combined digest of what was sent.

        Raises:
            WeightTransferError: a generator found other bytes or names than were sent.
        """
        digests = self._weights.digests()
        self._client.prepare(version, digests)
        self._sender.send_weights()
        return combined_digest(digests)

    def close(self) -> None:
        self._sender.shutdown()


class SharedMemorySender:
    """Sends through memory that generators on the same host map (the client carries it to other hosts).

    Each rank writes its own shard and nothing is gathered, where all ranks are on one host; else rank 0 writes all.

    The memory is a memfd: other processes of the user open it under /proc, and it goes with its creator, so a
    crash leaves nothing in /dev/shm (which containers often limit to 64 MB).
    """

    def __init__(self, client: WeightClient, source: PolicyWeights, one_host: bool) -> None:
        self._client, self._source, self._one_host = client, source, one_host
        self._rank = dist.get_rank()
        self._infos = source.metadata()
        self._offsets: dict[str, int] = {}
        self._nbytes = 0
        for info in self._infos:
            self._offsets[info.name] = self._nbytes
            self._nbytes += -(-info.nbytes // ALIGNMENT) * ALIGNMENT
        path: list[str | None] = [None]
        if self._rank == 0:
            self._file = os.memfd_create("rft_cluster_weights")
            os.ftruncate(self._file, self._nbytes)
            path = [f"/proc/{os.getpid()}/fd/{self._file}"]
        dist.broadcast_object_list(path, src=0)
        assert path[0] is not None
        self._path = path[0]
        self._writes = one_host or self._rank == 0
        if self._writes:
            if self._rank != 0:
                self._file = os.open(self._path, os.O_RDWR)
            self._memory = mmap.mmap(self._file, self._nbytes)
            self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        if self._rank == 0:
            client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        whole = ((name, tensor, 0) for name, tensor in self._source)
        for name, rows, start in self._source.local_rows() if self._one_host else whole:
            if not self._writes:
                continue
            first = self._offsets[name] + start * WIRE_DTYPE.itemsize
            wire = rows.contiguous().view(-1).view(torch.uint8)
            self._bytes[first : first + len(wire)].copy_(wire)
        dist.barrier()  # all shards are written
        if self._rank == 0:
            update = SharedMemoryUpdate(
                path=self._path,
                nbytes=self._nbytes,
                names=[info.name for info in self._infos],
                dtype_names=[str(info.dtype).removeprefix("torch.") for info in self._infos],
                shapes=[list(info.shape) for info in self._infos],
                offsets=[self._offsets[info.name] for info in self._infos],
                digests=[],  # the proving client fills them in
            )
            self._client.start_weight_update()
            self._client.update_weights(asdict(update))
            self._client.finish_weight_update()
        dist.barrier()  # nobody writes again before all generators have read

    def shutdown(self) -> None:
        if self._writes:
            del self._bytes
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


def nccl_sender(client: WeightClient, source: PolicyWeights, address: str, generator_ranks: int) -> WeightSender:
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


def ipc_sender(client: WeightClient, source: PolicyWeights) -> WeightSender:
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
