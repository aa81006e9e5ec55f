"""The loss against numbers worked out by hand and against a plain, independent implementation."""

import math
from typing import NamedTuple

import pytest
import torch

from rft_cluster.algorithm.loss import grpo_loss, importance_weights, k3_divergence, sft_loss
from rft_cluster.config import AlgorithmSection

SETTINGS = AlgorithmSection(clip_low=0.2, clip_high=0.3, importance_cap=2.0, kl_beta=0.0)


class Batch(NamedTuple):
    generator_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities])


def one_token(new: float, old: float, generator: float, advantage: float) -> float:
    batch = Batch(logs(generator), torch.tensor([advantage]), torch.ones(1))
    return float(grpo_loss(logs(new), batch, logs(old), None, SETTINGS).loss)


def test_policy_term_by_hand():
    # ratio 0.5 / 0.4 = 1.25, inside [0.8, 1.3]: -1.25 * 2
    assert one_token(0.5, 0.4, 0.4, 2.0) == pytest.approx(-2.5)
    # ratio 0.6 / 0.4 = 1.5 is clipped to 1.3 for a positive advantage ...
    assert one_token(0.6, 0.4, 0.4, 2.0) == pytest.approx(-2.6)
    # ... and not for a negative one: the pessimistic bound
    assert one_token(0.6, 0.4, 0.4, -2.0) == pytest.approx(3.0)
    # ratio 0.2 / 0.4 = 0.5 is clipped to 0.8 for a negative advantage
    assert one_token(0.2, 0.4, 0.4, -2.0) == pytest.approx(1.6)


def test_importance_is_truncated_from_above_only():
    # old / generator: 0.4 / 0.5 = 0.8; 0.4 / 0.1 = 4, capped at 2
    weights = importance_weights(logs(0.4, 0.4), logs(0.5, 0.1), cap=2.0)
    assert weights.tolist() == pytest.approx([0.8, 2.0])
    assert importance_weights(logs(0.4), logs(0.1), cap=None).tolist() == [1.0]
    # it scales the policy term: 2 * -(1 * 3)
    assert one_token(0.4, 0.4, 0.1, 3.0) == pytest.approx(-6.0)


def test_k3_by_hand_and_clamped():
    # d = log(0.2 / 0.4): 0.5 - log 0.5 - 1 = 0.193147
    assert float(k3_divergence(logs(0.4), logs(0.2))) == pytest.approx(0.193147, abs=1e-6)
    assert float(k3_divergence(logs(0.4), logs(0.4))) == 0.0
    # a log-ratio of 50 nats would be 5e21; clamped at 10: exp(10) - 11
    huge = k3_divergence(torch.tensor([-60.0]), torch.tensor([-10.0]))
    assert float(huge) == pytest.approx(math.exp(10) - 11, rel=1e-5)


@pytest.mark.parametrize("difference", [-40.0, -15.0, -11.0, -10.0, -9.0, -1.0, 0.0, 1.0, 9.0, 9.99])
def test_k3_pulls_as_trl_s_does_wherever_it_cannot_overflow(difference):
    """TRL's per_token_kl is exp(d) - d - 1 with d = ref - policy, and its derivative by the policy 1 - exp(d)."""
    policy = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    value = k3_divergence(policy, policy.detach() + difference)
    value.sum().backward()
    assert policy.grad is not None
    assert float(value.detach()) == pytest.approx(math.exp(difference) - difference - 1, rel=1e-12, abs=1e-12)
    assert float(policy.grad) == pytest.approx(1 - math.exp(difference), rel=1e-12, abs=1e-12)


def test_padding_counts_nowhere():
    learner = torch.full((5,), -1.0, requires_grad=True)
    weights = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0])
    batch = Batch(torch.full((5,), -1.5), torch.full((5,), 2.0), weights)
    terms = grpo_loss(learner, batch, learner, None, SETTINGS.model_copy(update={"importance_cap": None}))
    terms.loss.backward()
    assert terms.sums.loss == pytest.approx(-0.6)
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([-0.2, -0.2, -0.2, 0.0, 0.0])
    assert terms.sums.tokens == 3
    assert terms.sums.logprob_gap == pytest.approx(3 * 0.5)
    assert terms.gaps.tolist() == pytest.approx([0.5] * 5)
    assert not terms.gaps.requires_grad


def test_gradients_equal_a_plain_implementation():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return -2 * torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths, beta = [7, 1, 3, 5, 2], 0.04
    rows, tokens = len(lengths), sum(lengths)
    learner = draw(tokens).requires_grad_()
    old, sampled, reference = draw(tokens), draw(tokens), draw(tokens)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    count = torch.tensor(lengths)
    weights = (1.0 / (count.double() * rows)).repeat_interleave(count)
    batch = Batch(sampled, advantages.repeat_interleave(count), weights)
    terms = grpo_loss(learner, batch, old, reference, SETTINGS.model_copy(update={"kl_beta": beta}))
    (gradient,) = torch.autograd.grad(terms.loss, learner)

    plain = learner.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(rows):
        completion = torch.zeros((), dtype=torch.float64)
        for j in range(sum(lengths[:i]), sum(lengths[: i + 1])):
            ratio = torch.exp(plain[j] - old[j])
            importance = min(math.exp(old[j] - sampled[j]), 2.0)
            bounded = min(max(float(ratio), 0.8), 1.3)
            inside = float(ratio) == bounded
            surrogate = torch.minimum(ratio * advantages[i], (ratio if inside else bounded) * advantages[i])
            difference = reference[j] - plain[j]
            completion = completion - importance * surrogate + beta * (torch.exp(difference) - difference - 1)
        total = total + completion / lengths[i]
    (expected,) = torch.autograd.grad(total / rows, plain)
    assert float(terms.loss) == pytest.approx(float(total) / rows, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_the_loss_of_sft_by_hand():
    """Two targets, of one and of two tokens, and a padding token: (-log 0.5 + (-log 0.25 - log 0.125) / 2) / 2."""
    batch = Batch(torch.empty(0), torch.ones(4), torch.tensor([0.5, 0.25, 0.25, 0.0]))
    terms = sft_loss(logs(0.5, 0.25, 0.125, 0.9), batch)
    expected = (math.log(2) + (math.log(4) + math.log(8)) / 2) / 2
    assert (float(terms.loss), terms.sums.loss) == (pytest.approx(expected), pytest.approx(expected))
    assert (terms.sums.tokens, terms.sums.logprob_gap, terms.sums.importance, terms.gaps) == (3, 0.0, 0.0, None)


def test_the_gradient_of_sft_is_that_of_grpo_at_a_ratio_and_an_advantage_of_1():
    weights = torch.tensor([0.5, 0.25, 0.25])
    ours, theirs = (logs(0.5, 0.25, 0.125).requires_grad_() for _ in range(2))
    sft_loss(ours, Batch(torch.empty(0), torch.ones(3), weights)).loss.backward()
    settings = SETTINGS.model_copy(update={"importance_cap": None})
    grpo_loss(theirs, Batch(torch.zeros(3), torch.ones(3), weights), theirs, None, settings).loss.backward()
    assert ours.grad.tolist() == theirs.grad.tolist() == (-weights).tolist()
