"""The log-probabilities' own backward against autograd's."""

import pytest
import torch
from torch import Tensor

from rft_cluster.model import logprobs
from rft_cluster.model.logprobs import Sampled, token_logprobs

TOKENS, WIDTH, VOCABULARY, FORBIDDEN = 11, 6, 40, [0, 7, 39]


def by_autograd(states: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    allowed[FORBIDDEN] = False
    logits = (states @ weight.T / temperature).masked_fill(~allowed, -torch.inf)
    every = logits.log_softmax(-1)
    kept = every[:, allowed]
    return every[torch.arange(len(token_ids)), token_ids], -(kept.exp() * kept).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 512])
def test_values_and_gradients_are_those_of_autograd(monkeypatch, temperature, chunk):
    monkeypatch.setattr(logprobs, "LOGPROB_CHUNK", chunk)
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(rows, WIDTH, generator=draw, requires_grad=True) for rows in (TOKENS, VOCABULARY)]
    token_ids = torch.randint(8, 39, (TOKENS,), generator=draw)
    found, entropy = token_logprobs(*given, token_ids, Sampled(temperature, FORBIDDEN))
    expected, entropies = by_autograd(*given, token_ids, temperature)
    assert not entropy.requires_grad
    factors = torch.linspace(-1, 2, TOKENS)
    pairs = zip(
        (found, entropy, *torch.autograd.grad(found, given, factors)),
        (expected, entropies, *torch.autograd.grad(expected, given, factors)),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [7, 4096])
def test_logits_that_are_not_rounded_to_bf16(monkeypatch, rows):
    """Those of a trained model are near 30, where a step of BF16 is 0.125."""
    monkeypatch.setattr(logprobs, "HEAD_ROWS", rows)
    draw = torch.Generator().manual_seed(0)
    states, weight = (
        (4 * torch.randn(size, WIDTH, generator=draw)).to(torch.bfloat16) for size in (TOKENS, VOCABULARY)
    )
    token_ids = torch.randint(8, 39, (TOKENS,), generator=draw)
    wanted, _ = by_autograd(states.double(), weight.double(), token_ids, 1.0)
    rounded, _ = token_logprobs(states, weight, token_ids, Sampled(1.0, FORBIDDEN))
    found, _ = token_logprobs(states.float(), weight, token_ids, Sampled(1.0, FORBIDDEN))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-4)
    assert (rounded - wanted).abs().max() > 0.02, "else this test shows nothing"


def test_a_frozen_head_gets_no_gradient():
    states, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH)
    found, _ = token_logprobs(states, weight, torch.arange(8, 8 + TOKENS), Sampled(1.0, FORBIDDEN))
    found.sum().backward()
    assert states.grad is not None and weight.grad is None
