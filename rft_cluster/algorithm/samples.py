"""Turn scored groups into samples with advantages and loss weights: the part of the algorithm that runs in the driver.

Rewards -> totals -> advantages      Groups, advantages -> TrainingSamples with loss weights
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rft_cluster.common.function import Function
from rft_cluster.messages import Group, Reward, TrainingSample

Advantages = list[list[float | None]]


@dataclass(frozen=True)
class Algorithm:
    """The functions that the configuration names, and their settings.

    `weights`: of the rewards, by name. `max_tokens`: of a completion. `kl_beta`: weight of the KL in the loss.
    """

    total: Function
    advantage: Function
    normaliser: Function
    weights: Mapping[str, float]
    max_tokens: int
    kl_beta: float

    def advantages(self, rewards: Sequence[Sequence[Reward]]) -> Advantages:
        """An advantage for each completion of a step, or None if it is masked. Masked completions count nowhere.

        Raises:
            UserError: a function of the user's own raised, or returned something else than finite numbers.
        """
        valid = [[reward for reward in group if reward.total is not None] for group in rewards]
        totals = [self.total.numbers(self.total(group, self.weights), len(group)) for group in valid if group]
        found = iter(self.advantage.groups(self.advantage(totals), [len(group) for group in totals]))
        # A group whose every completion is masked was not among those that the function has seen.
        values = [iter(next(found) if group else ()) for group in valid]
        return [
            [None if reward.total is None else next(own) for reward in group]
            for own, group in zip(values, rewards, strict=True)
        ]

    def token_weights(self, lengths: Sequence[int]) -> list[float]:
        """The weight in the loss of each token of a completion, from the lengths in tokens of a step's completions.

        Raises:
            UserError: the normaliser is the user's own and raised, or returned something else than finite numbers.
        """
        return self.normaliser.numbers(self.normaliser(lengths, self.max_tokens), len(lengths), least=0.0)

    def samples(self, groups: Sequence[Group], advantages: Sequence[Sequence[float | None]]) -> list[TrainingSample]:
        """The samples that learners train on. Weights are computed over the whole step, before any is left out.

        A masked completion is left out and counts in no mean. A completion without tokens, or with an advantage of 0,
        is left out but counts in the means; with a KL, those with an advantage of 0 stay in.

        Raises:
            UserError: see `token_weights`.
        """
        counted = [
            (group, index, completion, advantage)
            for group, own in zip(groups, advantages, strict=True)
            for index, (completion, advantage) in enumerate(zip(group.completions, own, strict=True))
            if advantage is not None
        ]
        weights = self.token_weights([len(completion.token_ids) for _, _, completion, _ in counted])
        return [
            TrainingSample(
                prompt=group.prompt,
                prompt_token_ids=group.prompt_token_ids,
                token_ids=completion.token_ids,
                generator_logprobs=completion.generator_logprobs,
                advantage=advantage,
                weight=weight,
                index=index,
            )
            for (group, index, completion, advantage), weight in zip(counted, weights, strict=True)
            if completion.token_ids and (advantage != 0.0 or self.kl_beta > 0)
        ]
