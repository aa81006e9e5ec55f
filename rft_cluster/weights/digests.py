"""Digests of BF16 tensors: how both ends of the weight transfer know that they hold the same bytes.

A digest is a sum over elements, so ranks add up the digests of their shards without gathering a tensor. The bytes
are read as 64-bit words w of four elements, little-endian, the first and the last filled up with zeros:

    digest(t) = sum_i (w_i + HIGH * (w_i >> 32)) * (i + OFFSET)   mod 2^64     with i the word's place in the tensor

A word's upper half counts once more because of what 64 bits lose: without it, the sign bits of every fourth element
would come down to their parity. So any bit that changes is seen, and any two elements that are swapped.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSET = 0x9E3779B97F4A7C15 - 2**64  # odd, large: small places, too, change every bit of the sum
HIGH = 0x2545F4914F6CDD1D  # odd, so that a half that changes never counts for nothing
PER_WORD = 4
WORDS = 1 << 15  # at once: what a core's cache holds
WORDS_GPU = 1 << 22


def tensor_digest(tensor: Tensor, start: int = 0) -> int:
    """Digest of a BF16 tensor, or of a run of its elements from position `start`; runs' digests add up mod 2^64."""
    bits = tensor.contiguous().view(-1).view(torch.int16)
    place, before = divmod(start, PER_WORD)
    after = -(before + bits.numel()) % PER_WORD
    if before or after or bits.storage_offset() % PER_WORD:
        bits = F.pad(bits, (before, after))  # a copy, which starts and ends with whole words
    words = bits.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)  # sums and products wrap
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
    """Of integers mod 2^64. One pass on CPUs; GPUs have it for floating point alone."""
    return torch.dot(a, b) if a.device.type == "cpu" else (a * b).sum()


def wrap_int64(value: int) -> int:
    """An integer mod 2^64 as a signed 64-bit one, as tensor sums wrap."""
    return (value + 2**63) % 2**64 - 2**63


def added_up(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The digests of whole tensors, from those of the runs that each rank has of them."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: wrap_int64(sum(part.get(name, 0) for part in parts)) for name in names}


def combined_digest(digests: dict[str, int]) -> int:
    """One 64-bit number for named digests, whatever their order."""
    text = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
