"""The generators' end of the weight transfer: vLLM weight-transfer engines that verify what they receive.

`register()` adds them to vLLM's factory; it is also a vLLM plugin (see pyproject.toml), so that the worker
processes of a tensor-parallel engine know them. This file is imported where vLLM is: by generators.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Did exactly the tensors that were sent arrive, with the same bytes?

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
    """`path` is a file of `nbytes`, the learners' memory, which is theirs again when `verify` has returned."""

    path: str
    nbytes: int
    data: Any = None
    """The memory's contents, for a generator on another host: a buffer of bytes, read-only."""


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdateInfo]):
    """The engine for CPUs: loads weights from memory that the learners on this host have written."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdateInfo
    not_loaded: Sequence[str] = ()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        self._layout = init_info
        self._tensors: dict[str, Tensor] = {}
        self._mapped = ""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class ends with an accelerator's synchronisation; a CPU has none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        if update_info.data is not None:
            self._tensors = self._tensors_in(update_info.data)
        elif self._mapped != update_info.path:
            # Mapped once: each page costs at its first touch. What the learners write later is seen here (Linux).
            self._tensors = self._tensors_in(_mapping(update_info.path, update_info.nbytes))
            self._mapped = update_info.path
        self.model.load_weights(self._tensors.items())

    def finish_weight_update(self) -> None:
        tied: bool = self.model_config.hf_config.tie_word_embeddings
        self.not_loaded = layers_not_loaded(self.model, tied)
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output_layers(self.model)

    def verify(self, digests: dict[str, int]) -> tuple[int, int]:
        """Compare what lies in the memory with what was sent; it is read again, beside generation.

        Returns the combined digest of all tensors, and the digest of the engine's parameters.

        Raises:
            WeightTransferError: they differ.
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
        # Private: nothing written here could reach the learners; torch warns of a read-only buffer.
        return mmap.mmap(file, nbytes, flags=mmap.MAP_PRIVATE)
    finally:
        os.close(file)


class VerifiesWeights:
    """Mixed into a vLLM engine for GPUs: digests every tensor as it is loaded, for what was received is gone then."""

    not_loaded: Sequence[str] = ()

    def start_weight_update(self) -> None:
        self._received: dict[str, int] = {}
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        model: nn.Module = self.model  # type: ignore[has-type]
        digesting = DigestingModel(model)
        self.model = digesting  # all that vLLM's engines do with it here is to load weights
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model
        self._received |= digesting.digests  # an update may come in several calls

    def finish_weight_update(self) -> None:
        tied: bool = self.model_config.hf_config.tie_word_embeddings  # type: ignore[attr-defined]
        self.not_loaded = layers_not_loaded(self.model, tied)
        super().finish_weight_update()  # type: ignore[misc]

    def verify(self, digests: dict[str, int]) -> tuple[int, int]:
        """As `SharedMemoryEngine.verify`; the engine's parameters are compared among generators alone."""
        check_digests(self._received, digests)
        return combined_digest(self._received), parameter_digest(self.model)


class DigestingModel:
    """Stands in for a model while it loads: digests every tensor on its way into `load_weights`."""

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
    """vLLM's engine for GPUs of their own."""


class VerifiedIPCEngine(VerifiesWeights, IPCWeightTransferEngine):
    """vLLM's engine for a GPU that generator and learner share."""


def layers_not_loaded(model: nn.Module, tied: bool) -> list[str]:
    """The layers that did not take all of their weights. To be asked before the layer-wise reload is finalised.

    vLLM only logs a layer that took nothing, and fills one that took a part with whatever was in memory. A layer
    that has all is done with and says so (`can_load`); what else may be left waiting is an embedding, whose padding
    is never sent, and an output layer that is `tied` to it.
    """
    waiting = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        has_weights = next(layer.parameters(recurse=False), None) is not None
        padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0
        exempt = padded or (tied and isinstance(layer, ParallelLMHead))
        if info.can_load() and has_weights and not exempt:
            waiting.append(name)
    return waiting


def repack_output_layers(model: nn.Module) -> None:
    """Repack every lm_head. The CPU build computes with a packed copy of it, which the layer-wise reload leaves
    as it was where embeddings are tied: without this the engine samples from old output weights."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def parameter_digest(model: nn.Module) -> int:
    """One digest of all parameters as the engine holds them; equal on all generators of the same layout.

    The CPU build packs the weights of linear layers away from its parameters; the digest is of the others there.
    """
    total = 0
    for position, (_, parameter) in enumerate(model.named_parameters()):
        total = wrap_int64(total * 31 + position + tensor_digest(parameter.detach().to(WIRE_DTYPE)))
    return total


def register() -> None:
    """Make the engines known to vLLM; harmless when repeated."""
    engines = {
        "shared_memory": SharedMemoryEngine,
        "nccl": VerifiedNCCLEngine,
        "ipc": VerifiedIPCEngine,
    }
    for transfer, engine in engines.items():
        if ENGINES[transfer] not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(ENGINES[transfer], engine)
