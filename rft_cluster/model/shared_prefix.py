"""Attention for groups that share their prompt: one row, each prompt once, completions that do not see each other.

    row      [ prompt 1 | prompt 2 | ... | completion | completion | ... ]

A prompt attends to itself, a completion to its prompt and itself, both causally. Cut into segments of queries, each
with its own keys (a prompt's are its own, a completion's are its prompt's followed by its own), that is one call of
variable-length attention, causal aligned to the end of the keys; no mask of the row's length squared is ever made.
Both implementations below are registered with transformers; `common/hardware.py` names the one for a device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface


@dataclass(frozen=True)
class PackLayout:
    """Where the prompts and completions of a row of T tokens lie, as attention needs it.

    `segments` are the (queries, keys) of each prompt, then of each completion, in the order of the row; completions
    without a token in the row are left out. `key_rows` [K] int64 are the rows of all their keys, one segment after the
    other; `query_starts` and `key_starts` [segments + 1] int32 are where each begins, and where the last ends.
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
    """The layout of prompts and completions of so many tokens; `owners` names each completion's prompt by its index."""
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
    """Attention with torch's SDPA: neighbouring segments of one shape in one call. For CPUs.

    It computes in FP32: the backward of the CPU's BF16 kernel takes 0.13 ms for each head of each segment, however
    small, which for short completions is 40 times as long as in FP32, and is no faster for long ones.

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
        # SDPA's own causal mask is aligned to the first key. This one is as small as one segment.
        own, mask = queries == keys, None
        if not own:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        output = F.scaled_dot_product_attention(
            run[0], run[1], run[2], attn_mask=mask, is_causal=own, scale=scaling, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(dtype)


def _take(rows: Tensor, count: int, length: int) -> Tensor:
    """The first segments, `count` of one length: [rows, heads, size] -> [count, heads, length, size]."""
    return rows[: count * length].unflatten(0, (count, length)).transpose(1, 2)


def varlen_segments(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scaling: float) -> Tensor:
    """The same as `sdpa_segments` in one call of the flash-attention that comes with torch: GPUs, BF16 or FP16."""
    return varlen_attn(
        query,
        _gather(key, layout.key_rows),
        _gather(value, layout.key_rows),
        layout.query_starts,
        layout.key_starts,
        max(queries for queries, _ in layout.segments),
        max(keys for _, keys in layout.segments),
        scale=scaling,
        window_size=(-1, 0),  # causal; with fewer queries than keys flash-attention aligns it to the end
        enable_gqa=True,
    )


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """[T, heads, size], [K] -> [K, heads, size].

    As an embedding: a prompt's rows are read by each of its completions, and on GPUs the backward of an embedding
    adds their gradients up in FP32 and always in the same order, that of indexing does neither.
    """
    return F.embedding(index, rows.flatten(1)).unflatten(1, rows.shape[1:])


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
        """[1, heads, T, head size] -> [1, T, heads, head size], as transformers calls it and wants it back."""
        query, key, value = (rows[0].transpose(0, 1) for rows in (query, key, value))
        return attend(query, key, value, layout, scaling)[None], None

    AttentionInterface.register(name, forward)


_register("shared_prefix_sdpa", sdpa_segments)
_register("shared_prefix_varlen", varlen_segments)
