"""Attention by matrix products, for CPUs in BF16: torch's own kernels there reach a fifth of the rate of its products.

    scores = query key^T scaling        weights = softmax(scores)        output = weights value

Forward and backward of one layer for four images of 448 x 448 took 137 ms with it and 237 with SDPA (8 heads of 64, one
thread with AVX-512 BF16). Scores are rounded to BF16: the mean distance of a model's log-probabilities from those in
FP32 grew from 0.0037 to 0.0038 nats. Short sequences stay with SDPA.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

LONG = 256  # keys. Attention to fewer is a small part of a step; text computes it in FP32, and more exactly


def is_long(dtype: torch.dtype, keys: int) -> bool:
    """Whether this attention is faster than SDPA."""
    return dtype == torch.bfloat16 and keys >= LONG


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention with fewer key heads than heads allowed.

    Args:
        query: [batch, heads, queries, head size].
        key, value: [batch, key heads, keys, head size]; each key head serves `heads / key heads` neighbouring heads.
        mask: [queries, keys] bool, True where a query attends to a key; None: everywhere.

    Returns:
        [batch, heads, queries, head size].
    """
    batch, shared = len(query), query.shape[1] // key.shape[1]
    # The heads that share a key head, one below the other: [batch x key heads, heads x queries, head size].
    rows = query.unflatten(1, (-1, shared)).flatten(2, 3).flatten(0, 1)
    bias = query.new_zeros(1, 1)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf")).repeat(shared, 1)
    output: Tensor = _Attention.apply(rows, key.flatten(0, 1), value.flatten(0, 1), bias, scaling)
    return output.unflatten(0, (batch, -1)).unflatten(2, (shared, -1)).flatten(1, 2)


class _Attention(torch.autograd.Function):
    """Keeps no [queries, keys]: the backward computes the weights again, as flash-attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
        """[batch, queries, head size], twice [batch, keys, head size], and what is added to the scores."""
        ctx.save_for_backward(query, key, value, bias)
        ctx.scaling = scaling
        return _weights(query, key, bias, scaling) @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, bias = ctx.saved_tensors
        weights = _weights(query, key, bias, ctx.scaling)
        of_value = weights.mT @ gradient
        of_scores = torch._softmax_backward_data(gradient @ value.mT, weights, -1, weights.dtype)
        return (of_scores @ key).mul_(ctx.scaling), (of_scores.mT @ query).mul_(ctx.scaling), of_value, None, None


def _weights(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """[batch, queries, keys]."""
    return torch.baddbmm(bias, query, key.mT, alpha=scaling).softmax(-1)


def _vision(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, without a mask: [1, heads, patches, size] -> [1, patches, heads, size]."""
    if is_long(key.dtype, key.shape[2]):
        return attend(query, key, value, None, options["scaling"]).transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return result


AttentionInterface.register("matrix_or_sdpa", _vision)
