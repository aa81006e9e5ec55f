"""Attention for groups with a shared prompt: each prompt once in a row, and completions that do not see each other.

    row      [ prompt 1 | prompt 2 | ... | completion | completion | ... ]

A prompt attends to itself, a completion to its prompt and itself, both causally. The row is cut into segments of
queries. The keys of a prompt are its own; the keys of a completion are its prompt's, followed by its own. This makes
one call of variable-length attention, causal and aligned to the end of the keys, without a mask of [T, T].
Both implementations below are registered with transformers; `common/hardware.py` names the one for each device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface


@dataclass(frozen=True)
class PackLayout:
    """The prompts and completions in a row of T tokens.

    `segments`: number of (queries, keys) of each prompt, then of each completion, in the order of the row. Completions
        without a token in the row are left out.
    `key_rows` [K] int64: positions in the row of all keys, segment after segment.
    `query_starts`, `key_starts` [segments + 1] int32: where each segment begins; the last entry is the total.
    """

    segments: tuple[tuple[int, int], ...]
    key_rows: Tensor
    query_starts: Tensor
    key_starts: Tensor

    def to(self, device: torch.device) -> "PackLayout":
        return PackLayout(
            self.segments, self.key_rows.to(device), self.query_starts.to(device), self.key_starts.to(device)
        )


def pack_layout(prompts: Sequence[int], completions: Sequence[int], owners: Sequence[int]) -> PackLayout:
    """The layout for these lengths in tokens. `owners[i]` is the index of the prompt of completion i."""
    prompt_starts = [0, *accumulate(prompts)]
    starts = [*accumulate(completions, initial=prompt_starts[-1])][:-1]
    segments = [(length, length) for length in prompts]
    rows = [torch.arange(prompt_starts[-1])]
    for start, length, owner in zip(starts, completions, owners, strict=True):
        if length:
            segments.append((length, prompts[owner] + length))
            rows.append(torch.arange(prompt_starts[owner], prompt_starts[owner + 1]))
            rows.append(torch.arange(start, start + length))
    queries, keys = zip(*segments, strict=True)
    return PackLayout(tuple(segments), torch.cat(rows), _starts(queries), _starts(keys))


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


def sdpa_segments(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scaling: float) -> Tensor:
    """Attention with torch's SDPA, one call for neighbouring segments of the same shape. For CPUs.

    Computes in FP32. The CPU's BF16 backward takes at least 0.13 ms for each head of each segment: 40 times as long as
    FP32 for short completions, and no faster for long ones.

    Args:
        query: [T, heads, head size].
        key, value: [T, key heads, head size].

    Returns:
        [T, heads, head size] in the dtype of `query`.
    """
    dtype = query.dtype
    query, key, value = query.float(), _gather(key.float(), layout.key_rows), _gather(value.float(), layout.key_rows)
    outputs = []
    for (queries, keys), equal in groupby(layout.segments):
        count = len(list(equal))
        run = [_take(rows, count, length) for rows, length in ((query, queries), (key, keys), (value, keys))]
        query, key, value = query[count * queries :], key[count * keys :], value[count * keys :]
        # SDPA's own causal mask is aligned to the first key, so make one that is aligned to the last, for one segment.
        own, mask = queries == keys, None
        if not own:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        output = F.scaled_dot_product_attention(
            run[0], run[1], run[2], attn_mask=mask, is_causal=own, scale=scaling, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(dtype)


def _take(rows: Tensor, count: int, length: int) -> Tensor:
    """Reshape the first `count` segments of one length: [rows, heads, size] -> [count, heads, length, size]."""
    return rows[: count * length].unflatten(0, (count, length)).transpose(1, 2)


def varlen_segments(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scaling: float) -> Tensor:
    """As `sdpa_segments`, in one call of torch's own flash-attention. For GPUs, in BF16 or FP16."""
    return varlen_attn(
        query,
        _gather(key, layout.key_rows),
        _gather(value, layout.key_rows),
        layout.query_starts,
        layout.key_starts,
        max(queries for queries, _ in layout.segments),
        max(keys for _, keys in layout.segments),
        scale=scaling,
        window_size=(-1, 0),  # causal; flash-attention aligns it to the end if there are fewer queries than keys
        **_shared_heads(varlen_attn),
    )


@cache
def _shared_heads(attend: Callable[..., Any]) -> dict[str, bool]:
    """The argument that lets several query heads share a key head.

    torch 2.11's function has none: its kernel shares them unasked. Later ones refuse unequal numbers of heads without.
    """
    return {"enable_gqa": True} if "enable_gqa" in signature(attend).parameters else {}


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """[T, heads, size], [K] -> [K, heads, size].

    Uses an embedding lookup in FP32. Each completion reads its prompt's rows, so the backward adds up gradients. On
    GPUs an embedding adds them in a fixed order, which indexing does not; in BF16 both would round between additions.
    """
    return F.embedding(index, rows.flatten(1).float()).to(rows.dtype).unflatten(1, rows.shape[1:])


def _register(name: str, attend: Callable[[Tensor, Tensor, Tensor, PackLayout, float], Tensor]) -> None:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        layout: PackLayout,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: [1, heads, T, head size] -> [1, T, heads, head size]."""
        query, key, value = (rows[0].transpose(0, 1) for rows in (query, key, value))
        return attend(query, key, value, layout, scaling)[None], None

    AttentionInterface.register(name, forward)


_register("shared_prefix_sdpa", sdpa_segments)
_register("shared_prefix_varlen", varlen_segments)
