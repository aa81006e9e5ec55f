"""The reward actor's work: score groups of completions with the configured reward functions.

scorer = Scorer({"format": 1.0, "accuracy": 1.0}, ScoringSection())
rewards = scorer.score(groups)      # rewards[i][j] is of groups[i].completions[j]
"""

from collections import Counter

from rft_cluster.config import ScoringSection
from rft_cluster.errors import UserError
from rft_cluster.messages import Group, Reward
from rft_cluster.rewards.scoring import WeightedRewards


class Scorer:
    """Scores completions; the weights of the rewards are by name or dotted path (see `load_rewards`)."""

    def __init__(self, rewards: dict[str, float], scoring: ScoringSection) -> None:
        self._rewards = WeightedRewards(rewards, scoring.time_limit)
        self._budget = scoring.failure_budget

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """One reward for each completion of a step, in order. Where a user's function failed there is no total.

        Raises:
            UserError: more of the step's completions than the budget allows are without a reward (as soon as that
                is sure), or a function cannot be imported.
        """
        allowed = self._budget * sum(len(group.completions) for group in groups)
        scored: list[list[Reward]] = []
        for group in groups:
            scored.append(self._rewards.score(group.prompt, group.completions))
            if sum(bool(reward.failures) for rewards in scored for reward in rewards) > allowed:
                raise UserError(_over_budget(groups, scored, self._budget))
        return scored

    def close(self) -> None:
        """End the processes of the user's own functions."""
        self._rewards.close()


def _over_budget(groups: list[Group], scored: list[list[Reward]], budget: float) -> str:
    """`scored` may end before `groups` does."""
    failed = [
        (group.prompt, reward)
        for group, rewards in zip(groups, scored, strict=False)
        for reward in rewards
        if reward.failures
    ]
    name, count = Counter(name for _, reward in failed for name in reward.failures).most_common(1)[0]
    prompt, reason = next((prompt, reward.failures[name]) for prompt, reward in failed if name in reward.failures)
    return (
        f"rewards.{name} failed on {count} of the {sum(map(len, scored))} completions that were scored, of "
        f"{sum(len(group.completions) for group in groups)} in the step; scoring.failure_budget allows "
        f"{100 * budget:g} % of a step. The first failure: {reason}, on {prompt.prompt_id} ({prompt.example_id}). "
        f"Mend the function, or raise scoring.time_limit or scoring.failure_budget"
    )
