"""The policy's weights in the form for the transfer: full BF16 tensors with merged adapters, and their digests."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rft_cluster.model.policy import PolicyModel
from rft_cluster.weights.digests import tensor_digest

WIRE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the transfer: its checkpoint name, dtype and full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of one weight: the effective weight is `weight + scale * up @ down`."""

    down: Tensor  # [rank, in], may be sharded
    up: Tensor  # [out, rank], sharded like the weight
    scale: float


class PolicyWeights:
    """The policy's weights as vLLM's `WeightSource`: yields full BF16 tensors and gathers only one at a time.

    Iteration is a collective: every rank iterates, in the same order. Adapters are merged, so generators and exports
    get an ordinary model of its family.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self._parameters: dict[str, tuple[Tensor, Adapter | None]] = {}
        for name, parameter in policy.model.named_parameters():  # yields a tied weight once
            if ".lora_" not in name:
                self._parameters[name.replace(".base_layer", "")] = (parameter, _adapter_of(policy, name))
        self._digests: dict[str, int] = {}

    def metadata(self) -> list[TensorInfo]:
        return [TensorInfo(name, WIRE_DTYPE, tuple(p.shape)) for name, (p, _) in self._parameters.items()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._digests = {}
        for (name, (parameter, _)), (_, rows, start) in zip(self._parameters.items(), self.local_rows(), strict=True):
            rows = rows.to(WIRE_DTYPE)
            self._digests[name] = tensor_digest(rows, start)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = DTensor.from_local(
                    rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
                yield name, whole.full_tensor()
            else:
                yield name, rows

    def local_rows(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield this rank's shards: (name, rows, index of their first element in the flattened tensor).

        Rows have the masters' dtype. FSDP2 shards the first dimension evenly, so a shard is contiguous.
        """
        for name, (parameter, adapter) in self._parameters.items():
            if not isinstance(parameter, DTensor):
                yield name, _merged(parameter.detach(), adapter), 0
                continue
            rows, mesh = parameter.shape[0], parameter.device_mesh
            first_row = min(-(-rows // mesh.size()) * mesh.get_local_rank(), rows)
            # Offloaded weights are in host memory, but the transfer needs them on the device.
            local = parameter.detach().to_local().to(mesh.device_type)
            yield name, _merged(local, adapter), first_row * (parameter.numel() // rows)

    def digests(self) -> dict[str, int]:
        """Digests of this rank's rows of each BF16 tensor, as the last iteration yielded them.

        They are of the bytes that were sent, not of a second computation. Over all ranks they add up
        (`digests.added_up`).
        """
        return self._digests


def _adapter_of(policy: PolicyModel, name: str) -> Adapter | None:
    """The LoRA adapter of a weight, if any. PEFT keeps it beside the weight, which it calls `base_layer.weight`."""
    if not name.endswith(".base_layer.weight"):
        return None
    layer = policy.model.get_submodule(name.removesuffix(".base_layer.weight"))
    (adapter,) = layer.lora_A
    return Adapter(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])


def _merged(rows: Tensor, adapter: Adapter | None) -> Tensor:
    """Rows of a weight with the adapter merged: [rows, ...]."""
    if adapter is None:
        return rows
    down, up = adapter.down.detach(), adapter.up.detach()
    down = down.full_tensor() if isinstance(down, DTensor) else down
    up = up.to_local() if isinstance(up, DTensor) else up
    # Offloaded adapters are in host memory. A product of the 2B model's takes seconds there, and little on the device.
    return rows.float() + adapter.scale * (up.to(rows.device) @ down.to(rows.device))
