"""The generators' end of the weight transfer: vLLM weight-transfer engines that verify what they receive.

`register()` adds them to vLLM's factory. It is also a vLLM plugin (see pyproject.toml), for the worker processes of a
tensor-parallel engine. Only generators import this file, because it imports vLLM.
"""

import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.weights.digests import combined_digest, tensor_digest, wrap_int64
from rft_cluster.weights.source import WIRE_DTYPE

# Names in vLLM's factory, by `Hardware.transfer`.
ENGINES = {"shared_memory": "rft_shared_memory", "nccl": "rft_nccl", "ipc": "rft_ipc"}


def check_digests(received: Mapping[str, int], sent: Mapping[str, int]) -> None:
    """Check that exactly the sent tensors were received, with the same bytes.

    Raises:
        WeightTransferError: tensors are missing or unknown, or their digests differ.
    """
    if missing := sorted(set(sent) - set(received)):
        raise WeightTransferError(f"{len(missing)} of {len(sent)} tensors never arrived, first {missing[0]}")
    if unknown := sorted(set(received) - set(sent)):
        raise WeightTransferError(f"{len(unknown)} tensors arrived that were not announced, first {unknown[0]}")
    if wrong := [name for name in sent if received[name] != sent[name]]:
        raise WeightTransferError(f"{len(wrong)} of {len(sent)} tensors arrived with other bytes, first {wrong[0]}")


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """See `shared_memory.SharedMemoryLayout`."""

    names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """`path`: the learners' memory as a file of `nbytes`. The learners may write to it again when `verify` returned."""

    path: str
    nbytes: int
    data: Any = None
    """The memory's contents as a read-only buffer, for a generator on another host."""


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdateInfo]):
    """The engine for CPUs: loads weights from the memory that the learners wrote."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdateInfo
    not_loaded: Sequence[str] = ()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        self._layout = init_info
        self._tensors: dict[str, Tensor] = {}
        self._mapped = ""

    def start_weight_update(self) -> None:
        self._tied = tied_heads(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Do not call the base class's method: it ends with an accelerator's synchronisation.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        if update_info.data is not None:
            self._tensors = self._tensors_in(update_info.data)
        elif self._mapped != update_info.path:
            # Map once: the first access to each page is slow. The mapping shows later writes of the learners (Linux).
            self._tensors = self._tensors_in(_mapping(update_info.path, update_info.nbytes))
            self._mapped = update_info.path
        self.model.load_weights(self._tensors.items())

    def finish_weight_update(self) -> None:
        self.not_loaded = layers_not_loaded(self.model, self._tied)
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output_layers(self.model)

    def verify(self, digests: dict[str, int]) -> tuple[int, int]:
        """Read the memory again, while the engine generates, and compare it with the sent digests.

        Returns the combined digest of all tensors, and the digest of the engine's parameters.

        Raises:
            WeightTransferError: the digests differ.
        """
        received = {name: tensor_digest(tensor) for name, tensor in self._tensors.items()}
        check_digests(received, digests)
        return combined_digest(received), parameter_digest(self.model)

    def shutdown(self) -> None:
        pass

    def _tensors_in(self, memory: Any) -> dict[str, Tensor]:
        layout, elements = self._layout, torch.frombuffer(memory, dtype=WIRE_DTYPE)
        tensors = {}
        for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
            first = offset // WIRE_DTYPE.itemsize
            tensors[name] = elements[first : first + torch.Size(shape).numel()].view(shape)
        return tensors


def _mapping(path: str, nbytes: int) -> mmap.mmap:
    file = os.open(path, os.O_RDONLY)
    try:
        # Private, so that writes cannot reach the learners. (torch warns about read-only buffers.)
        return mmap.mmap(file, nbytes, flags=mmap.MAP_PRIVATE)
    finally:
        os.close(file)


class VerifiesWeights:
    """Mixin for vLLM's engines for GPUs: digests each tensor while it is loaded, because it is freed afterwards."""

    not_loaded: Sequence[str] = ()

    def start_weight_update(self) -> None:
        self._received: dict[str, int] = {}
        self._tied = tied_heads(self.model)  # type: ignore[has-type]
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        model: nn.Module = self.model  # type: ignore[has-type]
        digesting = DigestingModel(model)
        self.model = digesting  # during `receive_weights` vLLM's engines only call `load_weights` of it
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model
        self._received |= digesting.digests  # an update may take several calls

    def finish_weight_update(self) -> None:
        self.not_loaded = layers_not_loaded(self.model, self._tied)
        super().finish_weight_update()  # type: ignore[misc]

    def verify(self, digests: dict[str, int]) -> tuple[int, int]:
        """As `SharedMemoryEngine.verify`. The engine's parameters can only be compared among generators."""
        check_digests(self._received, digests)
        return combined_digest(self._received), parameter_digest(self.model)


class DigestingModel:
    """Wraps a model, and digests every tensor that is passed to `load_weights`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.digests: dict[str, int] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return self._model.load_weights(self._digested(weights))

    def _digested(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.digests[name] = tensor_digest(tensor)
            yield name, tensor


class VerifiedNCCLEngine(VerifiesWeights, NCCLWeightTransferEngine):
    """vLLM's NCCL engine, for generators with their own GPUs."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.shutdown()  # of the group before, which a lost actor has left: vLLM would keep its memory
        super().init_transfer_engine(init_info)


class VerifiedIPCEngine(VerifiesWeights, IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine, for a GPU shared by generator and learner."""


def tied_heads(model: nn.Module) -> set[str]:
    """The output layers that share their weight with an embedding. Call this before a layer-wise reload begins.

    The configuration does not tell: vLLM sets `tie_word_embeddings` to false if the checkpoint has an lm_head, and then
    ties the two again if they are equal.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = [layer.weight for _, layer in layers if not isinstance(layer, ParallelLMHead)]
    heads = [(name, layer.weight) for name, layer in layers if isinstance(layer, ParallelLMHead)]
    return {name for name, weight in heads if any(weight is embedding for embedding in embeddings)}


def layers_not_loaded(model: nn.Module, tied: Collection[str]) -> list[str]:
    """The layers that did not get all of their weights. Call this before the layer-wise reload is finalised.

    vLLM only logs a layer that got nothing, and leaves arbitrary memory in one that got some of its weights. A complete
    layer is no longer `can_load`. Two other layers may be: an embedding, whose padding is never sent, and an output
    layer that is `tied` to one (see `tied_heads`).
    """
    waiting = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        has_weights = next(layer.parameters(recurse=False), None) is not None
        padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0
        if info.can_load() and has_weights and not padded and name not in tied:
            waiting.append(name)
    return waiting


def repack_output_layers(model: nn.Module) -> None:
    """Repack every lm_head.

    The CPU build computes with a packed copy. With tied embeddings the layer-wise reload does not update that copy, and
    the engine would sample with the old output weights.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def parameter_digest(model: nn.Module) -> int:
    """One digest of all the engine's parameters; equal on all generators with the same layout.

    The CPU build removes packed weights of linear layers from its parameters. There the digest covers the others.
    """
    total = 0
    for position, (_, parameter) in enumerate(model.named_parameters()):
        total = wrap_int64(total * 31 + position + tensor_digest(parameter.detach().to(WIRE_DTYPE)))
    return total


def register() -> None:
    """Add the engines to vLLM's factory. Repeated calls have no effect."""
    engines = {
        "shared_memory": SharedMemoryEngine,
        "nccl": VerifiedNCCLEngine,
        "ipc": VerifiedIPCEngine,
    }
    for transfer, engine in engines.items():
        if ENGINES[transfer] not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(ENGINES[transfer], engine)
