"""The losses as sums over tokens (pure torch): GRPO's, and that of supervised fine-tuning.

    token loss = importance * -min(ratio * A, clip(ratio) * A) + beta * k3        loss = sum(weight * token loss)

A: group advantage (GRPO, arXiv 2402.03300). ratio: new over old policy, both the learner's (PPO, arXiv
1707.06347; separate bounds as in DAPO, arXiv 2503.14476). importance: old learner over generator, truncated from
above, without gradient: the engine that sampled computes slightly other probabilities than the learner.
k3: the KL estimator exp(d) - d - 1 with d = reference - learner (Schulman, "Approximating KL divergence", 2020).

SFT:  token loss = -log p(token)

The samples contain the weights, which define the mean over tokens (`normalisers.py`). Weights are computed over the
whole step, so the loss is the same sum for any split into micro-batches and ranks.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rft_cluster.config import AlgorithmSection
from rft_cluster.messages import LossSums

# exp(10) is far beyond any healthy token. Without a bound, exponentials could overflow.
MAX_LOG_RATIO = 10.0


class LossInputs(Protocol):
    """The fields of a micro-batch of C completion tokens that the loss needs (`learner.collate.Batch`); [C] FP32."""

    @property
    def generator_logprobs(self) -> Tensor:
        """Nats. Only for `grpo_loss`: nobody has sampled a target of SFT."""

    @property
    def advantages(self) -> Tensor:
        """Equal for all tokens of a completion, as are `weights`."""

    @property
    def weights(self) -> Tensor:
        """0 for the tokens of a padding sample, which count nowhere."""


class LossTerms(NamedTuple):
    """`loss`: scalar with gradient. `sums`: figures to add up over micro-batches and ranks. `gaps`: [C] FP32, nats:
    each token's |learner's log-probability - generator's|; None where no generator has sampled them."""

    loss: Tensor
    sums: LossSums
    gaps: Tensor | None


def importance_weights(old_logprobs: Tensor, generator_logprobs: Tensor, cap: float | None) -> Tensor:
    """min(old / generator, cap) for each token, without gradient; ones if `cap` is None. Any equal shapes."""
    if cap is None:
        return torch.ones_like(old_logprobs)
    log_ratio = (old_logprobs - generator_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)


def k3_divergence(learner_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(learner || reference) for each token, never negative. d = reference - learner is bounded above, by 10 nats.

    d has no lower bound: there the estimator is close to -d and cannot overflow, and its gradient pulls back a policy
    that does what the reference hardly ever would.
    """
    log_ratio = (reference_logprobs - learner_logprobs).clamp(max=MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(
    learner_logprobs: Tensor,
    batch: LossInputs,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    settings: AlgorithmSection,
) -> LossTerms:
    """The loss of one micro-batch of C completion tokens.

    Args:
        learner_logprobs, old_logprobs: [C] FP32 in nats; gradient flows into the first. The old policy is the
            learner's at the start of the step.
        reference_logprobs: [C], or None if `settings.kl_beta` is 0.
    """
    old, advantages = old_logprobs.detach(), batch.advantages
    ratio = (learner_logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    importance = importance_weights(old, batch.generator_logprobs, settings.importance_cap)
    token_loss = -importance * torch.minimum(ratio * advantages, clipped * advantages)

    divergence = torch.zeros_like(learner_logprobs)
    if settings.kl_beta:
        assert reference_logprobs is not None, "kl_beta needs reference_logprobs"
        divergence = k3_divergence(learner_logprobs, reference_logprobs.detach())
        token_loss = token_loss + settings.kl_beta * divergence

    loss = (token_loss * batch.weights).sum()
    counted = batch.weights > 0
    gaps = (old - batch.generator_logprobs).abs()
    is_clipped = (ratio * advantages) > (clipped * advantages)
    sums = LossSums(
        tokens=int(counted.sum()),
        loss=float(loss.detach()),
        kl=float((divergence.detach() * counted).sum()),
        logprob_gap=float((gaps * counted).sum()),
        importance=float((importance * counted).sum()),
        clipped=int((is_clipped & counted).sum()),
    )
    return LossTerms(loss, sums, gaps)


def sft_loss(learner_logprobs: Tensor, batch: LossInputs) -> LossTerms:
    """The negative log-likelihood of one micro-batch of C target tokens, in nats: the weighted mean over tokens.

    Nothing is clipped, however many updates a step makes: each is one of cross-entropy. Nor is there an importance
    weight, because no generator has sampled the tokens.

    Args:
        learner_logprobs: [C] FP32 in nats, with gradient.
    """
    loss = -(learner_logprobs * batch.weights).sum()
    return LossTerms(loss, LossSums(tokens=int((batch.weights > 0).sum()), loss=float(loss.detach())), None)
