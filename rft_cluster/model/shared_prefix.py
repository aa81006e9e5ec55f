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

from rft_cluster.model.matrix_attention import attend, is_long


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
    """Attention in one call for neighbouring segments of the same shape. For CPUs.

    Long segments in BF16 are computed by `matrix_attention`, others with torch's SDPA in FP32. SDPA's backward in BF16
    takes at least 0.13 ms for each head of each segment: for short completions 40 times as long as in FP32.

    Args:
        query: [T, heads, head size].
        key, value: [T, key heads, head size].

    Returns:
        [T, heads, head size] in the dtype of `query`.
    """
    runs = [(queries, keys, len(list(equal))) for (queries, keys), equal in groupby(layout.segments)]
    parts = (
        query.split([count * queries for queries, _, count in runs]),
        _gather(key.float(), layout.key_rows).split([count * keys for _, keys, count in runs]),
        _gather(value.float(), layout.key_rows).split([count * keys for _, keys, count in runs]),
    )
    outputs = []
    for (queries, keys, count), *rows in zip(runs, *parts, strict=True):
        # [rows, heads, size] -> [count, heads, length, size]
        run = [part.unflatten(0, (count, -1)).transpose(1, 2) for part in rows]
        # SDPA's own causal mask is aligned to the first key, so make one that is aligned to the last, for one segment.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if is_long(query.dtype, keys):
            output = attend(run[0], run[1].to(query.dtype), run[2].to(query.dtype), mask, scaling)
        else:
            output = F.scaled_dot_product_attention(
                run[0].float(), run[1], run[2],
                attn_mask=None if queries == keys else mask, is_causal=queries == keys, scale=scaling, enable_gqa=True,
            ).to(query.dtype)  # fmt: skip
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


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
    if not rows.requires_grad:
        return rows[index]
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
