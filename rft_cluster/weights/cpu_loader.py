"""Loads weights into a vLLM engine on a CPU at the speed of memory, in place of vLLM's layer-wise reload.

The CPU build computes with packed copies of the linear layers' weights and gives their parameters up. vLLM's reload
allocates each parameter anew, copies into it, packs it and drops it, with half a millisecond of Python for each
tensor. Here a plan is made once: which tensors on the wire make up which parameter of the engine. An update then
packs every linear layer straight from the memory that the learners wrote, and copies the rest over what the engine
holds. The result is, bit for bit, that of a fresh engine (tests/integration/test_weight_update.py).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rft_cluster.common.errors import WeightTransferError

BYTES_PER_THREAD = 1 << 25  # below this a thread costs more than it saves


@dataclass(frozen=True)
class EngineParameter:
    """A parameter of an engine: `layer.leaf`, whose rows are those of tensors on the wire, one after the other."""

    name: str
    layer: nn.Module
    leaf: str
    sources: dict[str, int]  # name on the wire -> rows

    @property
    def value(self) -> Tensor:
        return getattr(self.layer, self.leaf).data

    @property
    def packed(self) -> bool:
        """Does the layer compute with a packed copy, its parameter being empty?"""
        return self.value.numel() == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is loaded: before it is packed, and without an embedding's padding."""
        recorded = get_layerwise_info(self.layer).restore_metadata[0].get(self.leaf, self.value)
        if isinstance(self.layer, VocabParallelEmbedding):
            return (self.layer.org_vocab_size, *recorded.shape[1:])
        return tuple(recorded.shape)


def engine_parameters(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[EngineParameter]:
    """Which of the tensors that are sent, named as in a checkpoint with these `shapes`, make up which parameter.

    Raises:
        WeightTransferError: a tensor has no place in the engine, or a parameter would not be filled exactly.
    """
    held = {name for name, _ in model.named_parameters()}
    places: dict[str, dict[int, str]] = {}
    for name in shapes:
        place, part = _place(model, name, held)
        places.setdefault(place, {})[part] = name
    if missing := sorted(held - set(places)):
        raise WeightTransferError(f"{len(missing)} of the engine's parameters are not sent, first {missing[0]}")
    found = []
    for place, parts in places.items():
        prefix, _, leaf = place.rpartition(".")
        sources = {parts[part]: shapes[parts[part]][0] for part in sorted(parts)}
        parameter = EngineParameter(place, model.get_submodule(prefix), leaf, sources)
        if {(sum(sources.values()), *shapes[name][1:]) for name in sources} != {parameter.shape}:
            sent = ", ".join(f"{name} {list(shapes[name])}" for name in sources)
            raise WeightTransferError(f"the engine's {place} is {list(parameter.shape)}, but what is sent is {sent}")
        found.append(parameter)
    return found


def _place(model: Any, name: str, held: set[str]) -> tuple[str, int]:
    """The engine's parameter that a tensor is a part of, and which part."""
    (mapped,) = model.hf_to_vllm_mapper.apply_list([name]) or [name]
    if mapped in held:
        return mapped, 0
    for fused, parts in model.language_model.packed_modules_mapping.items():
        for number, part in enumerate(parts):
            if (place := mapped.replace(f".{part}.", f".{fused}.")) != mapped and place in held:
                return place, number
    raise WeightTransferError(f"the engine has no parameter for {name}")


class DirectLoader:
    """Fills the parameters of `model` from tensors of `shapes`, update after update."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._parameters = engine_parameters(model, shapes)
        # The largest first: then the threads end together.
        self._parameters.sort(key=lambda parameter: -torch.Size(parameter.shape).numel())
        self._old_copies: dict[str, Any] = {}

    def start(self) -> None:
        self._old_copies = {p.name: p.layer.cpu_linear for p in self._parameters if p.packed}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load every parameter. The learners wait meanwhile: their processors pack, too."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        processors = len(os.sched_getaffinity(0)) // torch.get_num_threads()
        with ThreadPoolExecutor(max(1, min(processors, nbytes // BYTES_PER_THREAD))) as pool:
            for _ in pool.map(lambda parameter: load_parameter(parameter, tensors), self._parameters):
                pass  # raises what a thread raised

    def not_loaded(self) -> list[str]:
        """The packed parameters whose copy is still the one of before `start`."""
        return [p.name for p in self._parameters if p.packed and p.layer.cpu_linear is self._old_copies[p.name]]

    def unpacked(self) -> Iterator[tuple[str, Tensor]]:
        """The rows that the engine holds as they were sent: (name on the wire, rows)."""
        for parameter in self._parameters:
            if not parameter.packed:
                yield from zip(parameter.sources, rows_of(parameter), strict=True)


def rows_of(parameter: EngineParameter) -> Sequence[Tensor]:
    """The rows of a parameter that is not packed, by source."""
    sizes = list(parameter.sources.values())
    return parameter.value[: sum(sizes)].split(sizes)


def load_parameter(parameter: EngineParameter, tensors: Mapping[str, Tensor]) -> None:
    sent = [tensors[name] for name in parameter.sources]
    if not parameter.packed:
        for rows, tensor in zip(rows_of(parameter), sent, strict=True):
            rows.copy_(tensor)
        return
    layer = parameter.layer
    weight = joined(sent).to(parameter.value.dtype)
    setattr(layer, parameter.leaf, nn.Parameter(weight, requires_grad=False))
    layer.quant_method.process_weights_after_loading(layer)  # packs, and gives the parameter up
    if not parameter.packed:
        raise WeightTransferError(f"the engine kept {parameter.name} as it came, which it packed when it started")


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [rows, ...] as one: a view of them where they lie one after the other in the same memory."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or tensor.storage_offset() != end:
            return torch.cat(list(tensors))
        end += tensor.numel()
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())
