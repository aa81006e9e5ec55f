"""vLLM's end of the weight transfer with vLLM's real dataclasses, without an engine."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.nccl import nccl_init_infos


def bf16(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def receivers() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        from rft_cluster.weights import receivers

        yield receivers


def payload(world_size: int) -> dict[str, Any]:
    """What vLLM's NCCL sender tells the generators, made by its own code."""
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload

    info = NCCLWeightTransferInitInfo(
        master_address="10.0.0.1", master_port=29501, rank_offset=1, world_size=world_size, packed=True
    )
    return worker_init_payload(info)


@pytest.mark.parametrize(
    ("sizes", "offsets", "world_size"),
    [
        ([1], [1], 2),
        ([1, 1, 1], [1, 2, 3], 4),
        ([2, 2], [1, 3], 5),
        ([2, 2, 2], [1, 3, 5], 7),  # the same with one generator more: the group is formed anew
        ([1, 4, 2], [1, 2, 6], 8),
    ],
)
def test_each_generator_joins_the_group_at_its_own_rank(receivers, sizes, offsets, world_size):
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

    sent = payload(world_size)
    infos = [NCCLWeightTransferInitInfo(**info) for info in nccl_init_infos(sent, sizes)]
    assert [info.rank_offset for info in infos] == offsets
    ranks = [info.rank_offset + i for info, size in zip(infos, sizes, strict=True) for i in range(size)]
    assert sorted([0, *ranks]) == list(range(world_size)), "the sender is rank 0; every rank is taken once"
    for info in infos:
        assert (info.master_address, info.master_port, info.world_size, info.packed) == (
            *("10.0.0.1", 29501, world_size, True),
        )
    assert sent == payload(world_size), "the sender's own is left as it was"


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ([1, 1], 5, "the transfer group has 5 ranks, but 3 take part"),
        ([2, 2, 2], 5, "the transfer group has 5 ranks, but 7 take part"),
        ([], 2, "the transfer group has 2 ranks, but 1 take part"),
    ],
)
def test_a_group_of_another_size_is_refused(receivers, sizes, world_size, message):
    with pytest.raises(ValueError, match=message):
        nccl_init_infos(payload(world_size), sizes)


class Model(nn.Module):
    """Takes what it is given, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.loaded |= dict(weights)
        return set(self.loaded)


SENT = {"a": bf16(1, 2), "b": bf16(3)}
DIGESTS = {name: tensor_digest(tensor) for name, tensor in SENT.items()}


def test_weights_that_pass_through_reach_the_model_and_are_digested(receivers):
    model = Model()
    digesting = receivers.DigestingModel(model)
    digesting.load_weights([("b", SENT["b"])])  # in pieces and in any order, as packed buffers come
    assert digesting.load_weights([("a", SENT["a"])]) == {"a", "b"}
    assert digesting.digests == DIGESTS
    assert {name: tensor.tolist() for name, tensor in model.loaded.items()} == {"a": [1, 2], "b": [3]}
    receivers.check_digests(digesting.digests, DIGESTS)


@pytest.mark.parametrize(
    ("arrived", "message"),
    [
        ({"a": bf16(1, 2)}, "1 of 2 tensors never arrived, first b"),
        ({}, "2 of 2 tensors never arrived, first a"),
        ({**SENT, "c": bf16(4)}, "1 tensors arrived that were not announced, first c"),
        ({**SENT, "b": bf16(3.015625)}, "1 of 2 tensors arrived with other bytes, first b"),  # one bit
        ({**SENT, "a": bf16(2, 1)}, "1 of 2 tensors arrived with other bytes, first a"),
        ({"a": bf16(3), "b": bf16(1, 2)}, "2 of 2 tensors arrived with other bytes, first a"),
    ],
)
def test_weights_that_do_not_arrive_whole_are_refused(receivers, arrived, message):
    digesting = receivers.DigestingModel(Model())
    digesting.load_weights(arrived.items())
    with pytest.raises(receivers.WeightTransferError, match=message):
        receivers.check_digests(digesting.digests, DIGESTS)


def test_a_model_that_skips_a_tensor_is_found_out(receivers):
    class Lazy(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            return {name for name, _ in [next(iter(weights))]}

    digesting = receivers.DigestingModel(Lazy())
    digesting.load_weights(SENT.items())
    with pytest.raises(receivers.WeightTransferError, match="1 of 2 tensors never arrived, first b"):
        receivers.check_digests(digesting.digests, DIGESTS)


# --- which tensors make up which of the engine's parameters


class Layer(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Mapper:
    """As vLLM's: names in, names out."""

    def apply_list(self, names: list[str]) -> list[str]:
        return [name.removeprefix("model.") for name in names]


class Engine(nn.Module):
    """Two parameters: one made of two tensors, one of one."""

    hf_to_vllm_mapper = Mapper()

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.gate_up_proj = Layer(5, 2)
        self.language_model.norm = Layer(2)
        self.language_model.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}


UP, GATE = "model.language_model.up_proj.weight", "model.language_model.gate_proj.weight"
NORM = "model.language_model.norm.weight"
SHAPES = {UP: (2, 2), GATE: (3, 2), NORM: (2,)}


def test_fused_parameters_are_filled_in_the_engine_s_order_whatever_that_of_the_wire(receivers):
    from rft_cluster.weights.cpu_loader import DirectLoader

    engine = Engine()
    loader = DirectLoader(engine, SHAPES)
    tensors = {UP: bf16(1, 2, 3, 4).view(2, 2), GATE: bf16(*range(5, 11)).view(3, 2), NORM: bf16(11, 12)}
    loader.start()
    loader.load(tensors)
    assert engine.language_model.gate_up_proj.weight.tolist() == [[5, 6], [7, 8], [9, 10], [1, 2], [3, 4]]
    assert engine.language_model.norm.weight.tolist() == [11, 12]
    held = dict(loader.unpacked())
    assert held.keys() == tensors.keys() and all(torch.equal(held[name], tensors[name].float()) for name in held)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({UP: (2, 2), GATE: (3, 2)}, "1 of the engine's parameters are not sent, first language_model.norm.weight"),
        (
            {GATE: (3, 2), NORM: (2,)},
            r"gate_up_proj.weight is \[5, 2\], but what is sent is .*gate_proj.weight \[3, 2\]",
        ),
        ({**SHAPES, UP: (3, 2)}, r"gate_up_proj.weight is \[5, 2\], but what is sent is "),
        ({**SHAPES, UP: (2, 3)}, r"gate_up_proj.weight is \[5, 2\], but what is sent is "),
        ({**SHAPES, "model.other.weight": (2,)}, "the engine has no parameter for model.other.weight"),
    ],
)
def test_a_model_that_does_not_fit_the_engine_is_refused(receivers, shapes, message):
    from rft_cluster.weights.cpu_loader import engine_parameters

    with pytest.raises(receivers.WeightTransferError, match=message):
        engine_parameters(Engine(), shapes)


def test_tensors_that_lie_one_after_the_other_are_joined_without_a_copy(receivers):
    from rft_cluster.weights.cpu_loader import joined

    memory = torch.arange(24.0).bfloat16()
    first, second, third = memory[:6].view(3, 2), memory[6:10].view(2, 2), memory[12:14].view(1, 2)
    together = joined([first, second])
    assert together.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert together.data_ptr() == memory.data_ptr()
    for apart in ([second, third], [second, first], [first, second.clone()]):
        assert joined(apart).tolist() == torch.cat(apart).tolist()
