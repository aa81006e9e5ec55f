"""The reward actor's work: score groups of completions with the configured reward functions.

scorer = Scorer({"format": 1.0, "accuracy": 1.0}, ScoringSection())
rewards = scorer.score(groups)      # rewards[i][j] is of groups[i].completions[j]
"""

from collections import Counter
from collections.abc import Sequence

from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Group, Prompt, Reward
from rft_cluster.rewards.scoring import WeightedRewards


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
