"""Digests of BF16 tensors, with which both ends of the weight transfer check that they have the same bytes.

A digest is a sum over elements, so ranks can add up the digests of their shards without gathering a tensor. The bytes
are read as little-endian 64-bit words w of four elements; the first and the last word are filled up with zeros:

    digest(t) = sum_i (w_i + HIGH * (w_i >> 32)) * (i + OFFSET)   mod 2^64     with i the word's index in the tensor

The high half is added again because products are taken mod 2^64: a flipped bit 63 would change the sum by 2^63 or 0
only, so two such flips (signs of every fourth element) could cancel. With this term any changed bit, and any swap of
two different elements, changes the digest.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSET = 0x9E3779B97F4A7C15 - 2**64  # odd and large, so that small indices also affect every bit of the sum
HIGH = 0x2545F4914F6CDD1D  # odd, so that a changed half always changes the sum
PER_WORD = 4
WORDS = 1 << 15  # words at once, to fit a core's cache
WORDS_GPU = 1 << 22


def tensor_digest(tensor: Tensor, start: int = 0) -> int:
    """Digest of a BF16 tensor, or of its elements from index `start` on. Digests of parts add up mod 2^64."""
    bits = tensor.contiguous().view(-1).view(torch.int16)
    place, before = divmod(start, PER_WORD)
    after = -(before + bits.numel()) % PER_WORD
    if before or after or bits.storage_offset() % PER_WORD:
        bits = F.pad(bits, (before, after))  # a copy that starts and ends with complete words
    words = bits.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)  # int64 sums and products wrap mod 2^64
    chunk = WORDS if bits.device.type == "cpu" else WORDS_GPU
    places = _places(chunk, bits.device)
    for first in range(0, words.numel(), chunk):
        part = words[first : first + chunk]
        part = torch.add(part, part >> 32, alpha=HIGH)
        total += _dot(part, places[: part.numel()]) + part.sum() * (place + first + OFFSET)
    return int(total)


@cache
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of int64 vectors mod 2^64. CPUs do it in one pass; on GPUs torch has `dot` only for floats."""
    return torch.dot(a, b) if a.device.type == "cpu" else (a * b).sum()


def wrap_int64(value: int) -> int:
    """The integer mod 2^64 as a signed 64-bit one, like int64 tensor sums."""
    return (value + 2**63) % 2**64 - 2**63


def added_up(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Add up the digests of all ranks' parts to digests of whole tensors."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: wrap_int64(sum(part.get(name, 0) for part in parts)) for name in names}


def combined_digest(digests: dict[str, int]) -> int:
    """Combine named digests into one 64-bit number, independent of their order."""
    text = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
