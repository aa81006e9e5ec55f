"""vLLM's end of the weight transfer with vLLM's real dataclasses, without an engine."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rft_cluster.weights import (
    combined_digest,
    nccl_init_infos,
    tensor_digest,
)


def bf16(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def receivers() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        from rft_cluster import receivers

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


def test_vllm_s_update_with_digests_is_ours(receivers):
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    theirs = asdict(NCCLWeightTransferUpdateInfo(["a", "b"], ["bfloat16"] * 2, [[2, 3], [4]]))
    ours = receivers.ProvenNCCLUpdateInfo(**theirs | {"digests": [1, -2]})
    assert (ours.names, ours.dtype_names, ours.shapes) == (["a", "b"], ["bfloat16", "bfloat16"], [[2, 3], [4]])
    assert ours.digests == [1, -2]
    assert receivers.ProvenNCCLEngine.update_info_cls is receivers.ProvenNCCLUpdateInfo


class Model(nn.Module):
    """Takes what it is given, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.loaded |= dict(weights)
        return set(self.loaded)


SENT = {"a": bf16(1, 2), "b": bf16(3)}
DIGESTS = [tensor_digest(tensor) for tensor in SENT.values()]


def test_weights_that_arrive_whole_pass_and_reach_the_model(receivers):
    model = Model()
    checked = receivers.CheckedModel(model)
    checked.load_weights([("b", SENT["b"])])  # in pieces and in any order, as packed buffers come
    assert checked.load_weights([("a", SENT["a"])]) == {"a", "b"}
    checked.check(["a", "b"], DIGESTS)
    assert combined_digest(checked.digests) == combined_digest(dict(zip("ab", DIGESTS, strict=True)))
    assert {name: tensor.tolist() for name, tensor in model.loaded.items()} == {"a": [1, 2], "b": [3]}


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
    checked = receivers.CheckedModel(Model())
    checked.load_weights(arrived.items())
    with pytest.raises(receivers.WeightTransferError, match=message):
        checked.check(["a", "b"], DIGESTS)


def test_a_model_that_skips_a_tensor_is_found_out(receivers):
    class Lazy(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            return {name for name, _ in [next(iter(weights))]}

    checked = receivers.CheckedModel(Lazy())
    checked.load_weights(SENT.items())
    with pytest.raises(receivers.WeightTransferError, match="1 of 2 tensors never arrived, first b"):
        checked.check(["a", "b"], DIGESTS)
