"""The reward actor's work: score groups of completions with the configured reward functions.

scorer = Scorer({"format": 1.0, "accuracy": 1.0}, ScoringSection())
rewards = scorer.score(groups)      # rewards[i][j] is of groups[i].completions[j]
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Completion, Group, Prompt, Reward
from rft_cluster.rewards import REWARDS, RewardFunction
from rft_cluster.rewards.isolation import IsolatedFunction


class Scorer:
    """Scores completions; the weights of the rewards are by name or dotted path (see `load_rewards`)."""

    def __init__(self, rewards: dict[str, float], scoring: ScoringSection) -> None:
        self._rewards = WeightedRewards(rewards, scoring.time_limit)
        self._budget = scoring.failure_budget

    def score(
        self, groups: list[Group], completions: int | None = None, prompts: list[Prompt] | None = None
    ) -> list[list[Reward]]:
        """One reward for each completion, in order. Where a user's function failed there is no total.

        Args:
            completions: the whole step's, of which the budget is a share, where `groups` are a part of a step.
            prompts: the groups' own, where these come without images.

        Raises:
            UserError: more than the budget allows are without a reward (as soon as that is sure), or a function
                cannot be imported.
        """
        completions = completions or sum(len(group.completions) for group in groups)
        scored: list[list[Reward]] = []
        for index, group in enumerate(groups):
            prompt = prompts[index] if prompts else group.prompt
            scored.append(self._rewards.score(prompt, group.completions))
            check_failures(groups, scored, completions, self._budget)
        totals = [reward.total for rewards in scored for reward in rewards if reward.total is not None]
        mean = f"reward {sum(totals) / len(totals):.3f} on average" if totals else "no reward"
        # For this actor's own log, which Ray keeps.
        print(f"{len(groups)} groups from {groups[0].prompt.prompt_id if groups else '-'} on: {mean}", flush=True)
        return scored

    def close(self) -> None:
        """End the processes of the user's own functions."""
        self._rewards.close()


def check_failures(
    groups: Sequence[Group], scored: Sequence[Sequence[Reward]], completions: int, budget: float
) -> None:
    """Have more than a `budget` share of a step's `completions` failed? `scored` may end before `groups` does.

    Raises:
        UserError: they have; names the reward that fails most, with its first reason.
    """
    failed = [
        (group.prompt, reward)
        for group, rewards in zip(groups, scored, strict=False)
        for reward in rewards
        if reward.failures
    ]
    if len(failed) <= budget * completions:
        return
    name, count = Counter(name for _, reward in failed for name in reward.failures).most_common(1)[0]
    prompt, reason = next((prompt, reward.failures[name]) for prompt, reward in failed if name in reward.failures)
    raise UserError(
        f"rewards.{name} failed on {count} of the {sum(map(len, scored))} completions that were scored, of "
        f"{completions} in the step; scoring.failure_budget allows "
        f"{100 * budget:g} % of a step. The first failure: {reason}, on {prompt.prompt_id} ({prompt.example_id}). "
        f"Mend the function, or raise scoring.time_limit or scoring.failure_budget"
    )


class WeightedRewards:
    """Built-in rewards run in this process, a user's own each in one of its own, which `close` ends.

    Args:
        weights: by name or dotted path (see `load_rewards`).
        time_limit: seconds for one call of a user's own.
    """

    def __init__(self, weights: Mapping[str, float], time_limit: float) -> None:
        self.weights = dict(weights)
        self._isolated = {name: IsolatedFunction(name, time_limit) for name in weights if name not in REWARDS}
        built_in = {name: partial(_each, REWARDS[name]) for name in weights if name in REWARDS}
        self._functions: dict[str, Callable[[Prompt, Sequence[Completion]], Sequence[float | str]]]
        self._functions = {**built_in, **self._isolated}

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Reward]:
        """One reward for each completion, in order; where a function of the user's failed it is without a total.

        Raises:
            UserError: a function of the user's own cannot be imported.
        """
        values = {name: self._functions[name](prompt, completions) for name in self.weights}
        return [self._weigh({name: values[name][index] for name in values}) for index in range(len(completions))]

    def wait_until_ready(self) -> None:
        """Until the user's own functions are imported.

        Raises:
            UserError: one cannot be.
        """
        for function in self._isolated.values():
            function.wait_until_ready()

    def close(self) -> None:
        for function in self._isolated.values():
            function.close()

    def _weigh(self, values: Mapping[str, float | str]) -> Reward:
        parts = {name: value for name, value in values.items() if not isinstance(value, str)}
        failures = {name: value for name, value in values.items() if isinstance(value, str)}
        total = None if failures else math.fsum(self.weights[name] * value for name, value in parts.items())
        return Reward(total, parts, failures)


def _each(function: RewardFunction, prompt: Prompt, completions: Sequence[Completion]) -> list[float | str]:
    return [function(prompt, completion) for completion in completions]
