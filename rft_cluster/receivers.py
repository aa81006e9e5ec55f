"""The generators' end of the weight transfer: vLLM weight-transfer engines that prove what they receive.

`register()` adds them to vLLM's factory; it is also a vLLM plugin (see pyproject.toml), so that the worker
processes of a tensor-parallel engine know them. This file is imported where vLLM is: by generators.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rft_cluster.weights import WeightTransferError, combined_digest, tensor_digest, wrap_int64

# Names in vLLM's factory, by `Hardware.transfer`.
ENGINES = {"shared_memory": "rft_shared_memory", "nccl": "rft_nccl", "ipc": "rft_ipc"}


class CheckedModel:
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

    def check(self, names: list[str], expected: list[int]) -> None:
        """Were exactly `names` loaded, with the `expected` digests?

        Raises:
            WeightTransferError: names are missing or unknown, or a tensor's bytes differ from those sent.
        """
        sent = dict(zip(names, expected, strict=True))
        if missing := sorted(set(sent) - set(self.digests)):
            raise WeightTransferError(f"{len(missing)} of {len(sent)} tensors never arrived, first {missing[0]}")
        if unknown := sorted(set(self.digests) - set(sent)):
            raise WeightTransferError(f"{len(unknown)} tensors arrived that were not announced, first {unknown[0]}")
        if wrong := [name for name in names if self.digests[name] != sent[name]]:
            raise WeightTransferError(f"{len(wrong)} of {len(sent)} tensors arrived with other bytes, first {wrong[0]}")


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    pass


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """See `weights.SharedMemoryUpdate`."""

    path: str
    nbytes: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    digests: list[int]
    data: Any = None
    """The memory's contents, for a generator on another host: a buffer of bytes, read-only."""


class ProvesWeights:
    """Mixed into a vLLM engine: digests every tensor as it is loaded and compares it with what was sent.

    `received_digest` covers all tensors since the update began, which may come in several calls; whether they are
    all there is seen by the sender, who knows the digest of the whole. `loaded_digest` is of the parameters that
    the engine then holds.
    """

    received_digest: int | None = None
    loaded_digest: int | None = None
    not_loaded: Sequence[str] = ()

    def start_weight_update(self) -> None:
        self.received_digest = None
        self._received: dict[str, int] = {}
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        model: nn.Module = self.model  # type: ignore[has-type]
        checked = CheckedModel(model)
        self.model = checked  # all that vLLM's engines do with it here is to load weights
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model
        checked.check(update_info.names, update_info.digests)
        self._received |= checked.digests
        self.received_digest = combined_digest(self._received)

    def finish_weight_update(self) -> None:
        tied: bool = self.model_config.hf_config.tie_word_embeddings  # type: ignore[attr-defined]
        self.not_loaded = layers_not_loaded(self.model, tied)
        super().finish_weight_update()  # type: ignore[misc]
        self.loaded_digest = parameter_digest(self.model)


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdateInfo]):
    """Loads weights from memory that the learners on this host have written."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class ends with an accelerator's synchronisation; a CPU has none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        memory = update_info.data
        if memory is None:
            file = os.open(update_info.path, os.O_RDONLY)
            try:
                # Private: nothing written here could reach the learners; torch warns of a read-only buffer.
                memory = mmap.mmap(file, update_info.nbytes, flags=mmap.MAP_PRIVATE)
            finally:
                os.close(file)
        # The mapping goes when the last tensor that looks into it goes.
        self.model.load_weights(_tensors(memory, update_info))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output_layers(self.model)

    def shutdown(self) -> None:
        pass


class ProvenSharedMemoryEngine(ProvesWeights, SharedMemoryEngine):
    """The engine for CPUs."""


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


def _tensors(memory: Any, info: SharedMemoryUpdateInfo) -> Iterator[tuple[str, Tensor]]:
    for name, dtype_name, shape, offset in zip(info.names, info.dtype_names, info.shapes, info.offsets, strict=True):
        dtype = getattr(torch, dtype_name)
        count = torch.Size(shape).numel()
        yield name, torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


@dataclass
class ProvenNCCLUpdateInfo(NCCLWeightTransferUpdateInfo):
    digests: list[int] = field(default_factory=list)


class ProvenNCCLEngine(ProvesWeights, NCCLWeightTransferEngine):
    """vLLM's engine for GPUs of their own."""

    update_info_cls = ProvenNCCLUpdateInfo


@dataclass
class ProvenIPCUpdateInfo(IPCWeightTransferUpdateInfo):
    digests: list[int] = field(default_factory=list)


class ProvenIPCEngine(ProvesWeights, IPCWeightTransferEngine):
    """vLLM's engine for a GPU that generator and learner share."""

    update_info_cls = ProvenIPCUpdateInfo


def parameter_digest(model: nn.Module) -> int:
    """One digest of all parameters as the engine holds them; equal on all generators of the same layout.

    The CPU build packs the weights of linear layers away from its parameters; the digest is of the others there.
    """
    total = 0
    for position, (_, parameter) in enumerate(model.named_parameters()):
        total = wrap_int64(total * 31 + position + tensor_digest(parameter.detach().to(torch.bfloat16)))
    return total


def register() -> None:
    """Make the engines known to vLLM; harmless when repeated."""
    engines = {
        "shared_memory": ProvenSharedMemoryEngine,
        "nccl": ProvenNCCLEngine,
        "ipc": ProvenIPCEngine,
    }
    for transfer, engine in engines.items():
        if ENGINES[transfer] not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(ENGINES[transfer], engine)
