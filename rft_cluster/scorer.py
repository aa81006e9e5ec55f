"""The reward actor's work: score groups of completions with the configured reward functions.

scorer = Scorer({"format": 1.0, "accuracy": 1.0})
rewards = scorer.score(groups)      # rewards[i][j] is of groups[i].completions[j]
"""

import math

from rft_cluster.messages import Completion, Group, Prompt, Reward
from rft_cluster.rewards import RewardFunction, load_rewards


class RewardError(RuntimeError):
    """A reward function failed. That is never a reward of 0, which would teach the policy something false."""


class Scorer:
    """Scores completions; the weights of the rewards are by name or dotted path (see `load_rewards`)."""

    def __init__(self, rewards: dict[str, float]):
        self.rewards = load_rewards(rewards)

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """One reward for each completion, in order.

        Raises:
            RewardError: a reward function raised, or returned something else than a finite number.
        """
        return [[self._reward(group.prompt, completion) for completion in group.completions] for group in groups]

    def _reward(self, prompt: Prompt, completion: Completion) -> Reward:
        parts = {name: _call(name, function, prompt, completion) for name, _, function in self.rewards}
        return Reward(total=math.fsum(weight * parts[name] for name, weight, _ in self.rewards), parts=parts)


def _call(name: str, function: RewardFunction, prompt: Prompt, completion: Completion) -> float:
    at = f"for {prompt.prompt_id} ({prompt.example_id}) on the completion {completion.text!r}"
    try:
        value = float(function(prompt, completion))
    except Exception as error:  # a user's function may raise anything; none of it is swallowed
        raise RewardError(f"reward {name!r} failed {at}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise RewardError(f"reward {name!r} returned {value} {at}; it must be finite")
    return value
