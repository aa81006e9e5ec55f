"""The configured rewards of a group's completions, and their weighted sums."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rft_cluster.messages import Completion, Prompt, Reward
from rft_cluster.rewards import REWARDS, RewardFunction
from rft_cluster.rewards.isolation import IsolatedFunction


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
