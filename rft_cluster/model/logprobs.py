"""Log-probabilities of given tokens from hidden states, without a [tokens x vocabulary] tensor for a whole sequence."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rft_cluster.model.shapes import LOGPROB_CHUNK

HEAD_ROWS = 16_384  # of the head that are in FP32 at a time


class Sampled(NamedTuple):
    """The distribution that the generator samples from: tempered, and without the `forbidden` tokens."""

    temperature: float
    forbidden: list[int]


def token_logprobs(states: Tensor, weight: Tensor, token_ids: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens, and the entropy of the distribution that each is from.

    Args:
        states: [C, hidden size], what predicts each token.
        weight: [vocabulary, hidden size] of the head, in the dtype of `states`, to which the logits are rounded, too.
            Or in BF16 with `states` in FP32, without a gradient: then the logits are in FP32.
        token_ids: [C] int64.

    Returns:
        log-probabilities [C] FP32 in nats, and entropy [C] FP32 in nats, without gradient.
    """
    pieces = [
        _Chunk.apply(some, weight, ids, sampled)
        for some, ids in zip(states.split(LOGPROB_CHUNK), token_ids.split(LOGPROB_CHUNK), strict=True)
    ]
    logprobs, entropy = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


class _Chunk(torch.autograd.Function):
    """The backward computes the logits again, as activation checkpointing would, but without the entropy: at most three
    FP32 tensors of [N, vocabulary] at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, token_ids: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states, weight, token_ids)
        ctx.sampled = sampled
        logprobs = _all_logprobs(states, weight, sampled)
        chosen = logprobs.gather(-1, token_ids[:, None]).squeeze(-1)
        terms = logprobs.exp().mul_(logprobs)
        terms[:, sampled.forbidden] = 0.0  # 0 * -inf would be NaN
        entropy = -terms.sum(-1)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """d log p(token) / d logit = [logit is the token's] - p(logit), over the temperature; 0 for forbidden ones."""
        states, weight, token_ids = ctx.saved_tensors
        sampled: Sampled = ctx.sampled
        logprobs = _all_logprobs(states, weight, sampled)
        chosen = torch.zeros_like(logprobs).scatter_(-1, token_ids[:, None], gradient[:, None])
        # torch's own kernel: it rounds once where separate operations would round twice.
        whole = torch._log_softmax_backward_data(chosen, logprobs, -1, logprobs.dtype)
        del chosen, logprobs
        whole[:, sampled.forbidden] = 0.0
        if sampled.temperature != 1.0:
            whole.div_(sampled.temperature)
        logits = whole.to(states.dtype)
        del whole
        of_states = logits @ weight if ctx.needs_input_grad[0] else None
        of_weight = (states.t() @ logits).t() if ctx.needs_input_grad[1] else None
        return of_states, of_weight, None, None


def _all_logprobs(states: Tensor, weight: Tensor, sampled: Sampled) -> Tensor:
    """[N, hidden size] -> [N, vocabulary] FP32."""
    if states.dtype == weight.dtype:
        logits = F.linear(states, weight).float()
    else:  # without a copy in FP32 of the whole head, 0.9 GB of a 2B model
        logits = states.new_empty(len(states), len(weight))
        for rows, columns in zip(weight.split(HEAD_ROWS), logits.split(HEAD_ROWS, dim=-1), strict=True):
            columns.copy_(F.linear(states, rows.to(states.dtype)))
    if sampled.temperature != 1.0:
        logits.div_(sampled.temperature)
    logits[:, sampled.forbidden] = float("-inf")
    return logits.log_softmax(-1)
