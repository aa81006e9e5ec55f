from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rft_cluster.weights import digests
from rft_cluster.weights.digests import HIGH, OFFSET, added_up, combined_digest, tensor_digest, wrap_int64


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
    # 1 is 0x3F80, 2 is 0x4000, -1 is 0xBF80; the fifth element begins the second word
    first, second = 0xC000_BF80_4000_3F80, 0x3F80
    halves = 0xC000_BF80 - 2**32  # the upper half is a signed number
    expected = (first + HIGH * halves) * OFFSET + second * (1 + OFFSET)
    tensor = bf16(1, 2, -1, -2, 1)
    assert tensor_digest(tensor) == (expected + 2**63) % 2**64 - 2**63
    assert tensor_digest(tensor.view(5, 1)) == tensor_digest(tensor)
    # From position 7 on: the last of the second word.
    assert tensor_digest(bf16(2), 7) == wrap_int64(((0x4000 << 48) + HIGH * (0x4000 << 16)) * (1 + OFFSET))


def test_a_part_of_a_tensor_has_the_digest_of_its_copy():
    tensor = random_tensor(40)
    for start in range(9):
        assert tensor_digest(tensor[start:]) == tensor_digest(tensor[start:].clone())


def test_a_digest_is_of_the_rows_in_order_whatever_the_memory_layout():
    tensor = random_tensor(6, 4)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(tensor.t()) != tensor_digest(tensor)


def test_digests_of_rows_add_up():
    tensor = random_tensor(7, 5)
    for cuts in ([3], [1, 2, 6], [0, 7], range(8)):  # in the middle of words, too
        bounds = [0, *cuts, 7]
        total = sum(tensor_digest(tensor[a:b], start=5 * a) for a, b in pairwise(bounds))
        assert wrap_int64(total) == tensor_digest(tensor)


def test_chunks_of_a_digest_add_up(monkeypatch):
    tensor = random_tensor(150)
    whole = tensor_digest(tensor, 9)
    monkeypatch.setattr(digests, "WORDS", 7)
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


def test_a_digest_sees_two_signs_turned():
    # A plain sum of words mod 2^64 loses them: the sign of every fourth element is the top bit of a word.
    tensor = random_tensor(80)
    for i in range(3, 80, 4):
        for j in range(3, i, 4):
            turned = tensor.clone()
            turned[i], turned[j] = -tensor[i], -tensor[j]
            assert tensor_digest(turned) != tensor_digest(tensor)


def test_a_digest_sees_what_is_cut_off_or_zero():
    tensor = random_tensor(1000)
    for count in (1, 4, 500, 999):
        assert tensor_digest(tensor[:-count]) != tensor_digest(tensor)
        assert tensor_digest(torch.cat([tensor[:-count], torch.zeros(count).bfloat16()])) != tensor_digest(tensor)


def test_a_digest_sees_the_sign_of_zero():
    assert tensor_digest(bf16(0.0)) != tensor_digest(bf16(-0.0))


def test_a_combined_digest_has_no_order_but_names():
    one = combined_digest({"a": 1, "b": -2})
    assert combined_digest({"b": -2, "a": 1}) == one
    assert len({one, combined_digest({"a": -2, "b": 1}), combined_digest({"a": 1}), combined_digest({})}) == 4
    assert -(2**63) <= one < 2**63


def test_the_digests_of_what_each_rank_sent_add_up_to_those_of_the_tensors():
    whole = {"a": random_tensor(20), "b": random_tensor(7)}
    first = {"a": tensor_digest(whole["a"][:9])}
    second = {"a": tensor_digest(whole["a"][9:], 9), "b": tensor_digest(whole["b"])}
    assert added_up([first, second]) == {name: tensor_digest(tensor) for name, tensor in whole.items()}
    assert added_up([{"a": 2**63 - 1}, {"a": 1}]) == {"a": -(2**63)}
    assert added_up([]) == {}
