from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rft_cluster import weights
from rft_cluster.messages import WeightRecord
from rft_cluster.qwen2vl import PolicyModel
from rft_cluster.tiny import build_model, build_processor
from rft_cluster.weights import (
    DIGEST_OFFSET,
    PolicyWeights,
    ProvingClient,
    WeightTransferError,
    check_records,
    combined_digest,
    tensor_digest,
    wrap_int64,
)

# --- digests


def bf16(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "wrapped"),
    [
        *((0, 0), (5, 5), (-5, -5), (2**63 - 1, 2**63 - 1), (-(2**63), -(2**63))),
        *((2**63, -(2**63)), (-(2**63) - 1, 2**63 - 1), (2**64, 0), (3 * 2**64 - 7, -7)),
    ],
)
def test_wrapping_is_that_of_signed_64_bits(value, wrapped):
    assert wrap_int64(value) == wrapped


def test_a_digest_by_hand():
    # 1 is 0x3F80 = 16256, 2 is 0x4000 = 16384, -1 is 0xBF80, as a signed 16-bit number 49024 - 65536 = -16512
    expected = 16256 * (0 + DIGEST_OFFSET) + 16384 * (1 + DIGEST_OFFSET) - 16512 * (2 + DIGEST_OFFSET)
    assert tensor_digest(bf16(1, 2, -1)) == (expected + 2**63) % 2**64 - 2**63
    assert tensor_digest(bf16(1, 2, -1).view(3, 1)) == tensor_digest(bf16(1, 2, -1))
    # From position 7 on.
    assert tensor_digest(bf16(2), 7) == wrap_int64(16384 * (7 + DIGEST_OFFSET))


def test_a_digest_is_of_the_rows_in_order_whatever_the_memory_layout():
    tensor = random_tensor(6, 4)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(tensor.t()) != tensor_digest(tensor)


def test_digests_of_rows_add_up():
    tensor = random_tensor(7, 5)
    for cuts in ([3], [1, 2, 6], [0, 7], range(8)):
        bounds = [0, *cuts, 7]
        total = sum(tensor_digest(tensor[a:b], start=5 * a) for a, b in pairwise(bounds))
        assert wrap_int64(total) == tensor_digest(tensor)


def test_chunks_of_a_digest_add_up(monkeypatch):
    tensor = random_tensor(50)
    whole = tensor_digest(tensor, 9)
    monkeypatch.setattr(weights, "DIGEST_CHUNK", 7)
    assert tensor_digest(tensor, 9) == whole


def test_a_digest_sees_every_bit_of_every_element():
    tensor = random_tensor(20)
    digests = {tensor_digest(tensor)}
    for position in range(20):
        for bit in range(16):
            changed = tensor.clone()
            changed.view(torch.int16)[position] ^= torch.tensor(1 << bit).to(torch.int16)
            digests.add(tensor_digest(changed))
    assert len(digests) == 1 + 20 * 16


def test_a_digest_sees_any_two_elements_swapped():
    tensor = torch.arange(1, 13).to(torch.bfloat16)
    for i in range(12):
        for j in range(i):
            swapped = tensor.clone()
            swapped[i], swapped[j] = tensor[j], tensor[i]
            assert tensor_digest(swapped) != tensor_digest(tensor)
    assert tensor_digest(tensor.roll(1)) != tensor_digest(tensor)


def test_a_digest_sees_the_sign_of_zero():
    assert tensor_digest(bf16(0.0)) != tensor_digest(bf16(-0.0))


def test_a_combined_digest_has_no_order_but_names():
    one = combined_digest({"a": 1, "b": -2})
    assert combined_digest({"b": -2, "a": 1}) == one
    assert len({one, combined_digest({"a": -2, "b": 1}), combined_digest({"a": 1}), combined_digest({})}) == 4
    assert -(2**63) <= one < 2**63


# --- the policy's weights


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    processor = build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PolicyModel(build_model(processor.tokenizer).float(), [], 1.0)


def test_what_is_sent_is_bf16_as_announced(policy):
    source = PolicyWeights(policy)
    announced = source.metadata()
    sent = list(source)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert [info.name for info in announced] == [name for name, _ in sent]
    for info, (name, tensor) in zip(announced, sent, strict=True):
        assert info.dtype == tensor.dtype == torch.bfloat16
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == 2 * tensor.numel()
        assert torch.equal(tensor, policy.model.get_parameter(name).to(torch.bfloat16))
    assert [name for name, _ in source] == [name for name, _ in sent], "each round iterates anew"


def test_a_tied_weight_comes_once(policy):
    names = [info.name for info in PolicyWeights(policy).metadata()]
    assert policy.model.lm_head.weight is policy.model.model.language_model.embed_tokens.weight
    assert [name for name in names if "embed_tokens" in name or "lm_head" in name] == [
        "model.language_model.embed_tokens.weight"
    ]
    assert len(names) == len(set(names)) == len(list(policy.parameters()))


def test_the_digests_of_one_rank_are_those_of_the_tensors(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        source = PolicyWeights(policy)
        assert source.digests() == {name: tensor_digest(tensor) for name, tensor in source}
    finally:
        dist.destroy_process_group()


# --- what the generators answer

NEXT = WeightRecord(version=5, received=22, loaded=222)


def test_records_that_agree_pass():
    check_records([NEXT, NEXT], 5, 22)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([replace(NEXT, version=4), NEXT], "generator 0 serves version 4 instead of 5"),
        ([NEXT, replace(NEXT, version=6)], "generator 1 serves version 6 instead of 5"),
        ([NEXT, NEXT, replace(NEXT, received=11)], "generator 2 received other weights for version 5 than were sent"),
        ([NEXT, replace(NEXT, loaded=223)], "generators 0 and 1 hold different parameters for version 5"),
        ([replace(NEXT, received=None)], "generator 0 received other weights for version 5 than were sent"),
        ([], "no generator reports that it serves version 5"),
    ],
)
def test_records_that_do_not_agree_are_refused(records, message):
    with pytest.raises(WeightTransferError, match=message):
        check_records(records, 5, 22)


class Generators:
    """Keeps what it is told, and answers with `records`."""

    def __init__(self) -> None:
        self.ranks = 2
        self.heard: list[Any] = []
        self.records: list[WeightRecord] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.heard.append(init_info)

    def start_weight_update(self) -> None:
        self.heard.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.heard.append(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> list[WeightRecord]:
        self.heard.append(weight_version)
        return self.records


def test_the_client_adds_digests_and_version_and_checks():
    generators, digests = Generators(), {"a": 1, "b": -2}
    client = ProvingClient(generators)
    client.init_weight_transfer_engine({"port": 5})
    client.prepare(5, digests)
    client.start_weight_update()
    client.update_weights({"names": ["a", "b"], "more": 3})
    generators.records = [WeightRecord(5, combined_digest(digests), 222)] * 2
    assert client.finish_weight_update() == generators.records
    assert generators.heard == [
        *({"port": 5}, "start", {"names": ["a", "b"], "more": 3, "digests": [1, -2]}, "5"),
    ]


def test_digests_follow_the_names_of_each_call():
    generators = Generators()
    client = ProvingClient(generators)
    client.prepare(5, {"a": 1, "b": -2, "c": 3})
    for names in (["c"], ["b", "a"]):
        client.update_weights({"names": names})
    assert [update["digests"] for update in generators.heard] == [[3], [-2, 1]]


def test_the_client_refuses_what_does_not_agree():
    generators, digests = Generators(), {"a": 1}
    client = ProvingClient(generators)
    client.prepare(5, digests)
    generators.records = [WeightRecord(4, combined_digest(digests), 222)]
    with pytest.raises(WeightTransferError, match="serves version 4 instead of 5"):
        client.finish_weight_update()
    generators.records = [WeightRecord(5, combined_digest({"a": 2}), 222)]
    with pytest.raises(WeightTransferError, match="received other weights"):
        client.finish_weight_update()
    generators.records = [WeightRecord(5, combined_digest(digests), 222)]
    client.finish_weight_update()
