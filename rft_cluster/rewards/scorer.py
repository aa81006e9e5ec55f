"""The reward actor's work: score groups of completions with the configured reward functions.

scorer = Scorer({"format": 1.0, "accuracy": 1.0}, ScoringSection(), images)
rewards = await scorer.score(groups)      # rewards[i][j] is of groups[i].completions[j]

Calls of `score` overlap: a step comes in parts, as generators finish them, and completions of all parts that are here
share `scoring.max_concurrent`.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Completion, Group, Images, Prompt, Reward
from rft_cluster.rewards import REWARDS, check_names, with_image
from rft_cluster.rewards.isolation import IsolatedFunction

PRINTED = 3  # lines of what a function prints that are shown


class Scorer:
    """Scores completions; the weights of the rewards are by name or dotted path."""

    def __init__(self, rewards: dict[str, float], scoring: ScoringSection, images: Images) -> None:
        self._rewards, self._images = WeightedRewards(rewards, scoring), images
        self._budget = scoring.failure_budget

    async def score(self, groups: list[Group], completions: int | None = None) -> list[list[Reward]]:
        """One reward for each completion, in order. Where a user's function failed there is no total.

        Args:
            completions: the whole step's, of which the budget is a share, where `groups` are a part of a step.

        Raises:
            UserError: more than the budget allows are without a reward (as soon as that is sure), or a function
                cannot be imported.
        """
        completions = completions or sum(len(group.completions) for group in groups)
        scored: list[list[Reward]] = []
        if self._rewards.has_own:
            # Images that another host has may take a while, in which the event loop goes on with other parts.
            await asyncio.to_thread(lambda: [self._images[group.prompt.example.image.sha256] for group in groups])
        scoring = [
            asyncio.ensure_future(self._rewards.score(group.prompt, group.completions, self._images))
            for group in groups
        ]
        try:
            for task in scoring:
                scored.append(await task)
                check_failures(groups, scored, completions, self._budget)
        finally:
            for task in scoring:
                task.cancel()
            await asyncio.gather(*scoring, return_exceptions=True)
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
        weights: by name or dotted path.
        quiet: what a user's own functions print is kept for `printed`.

    Raises:
        UserError: a name is neither a built-in reward's nor a dotted path.
    """

    def __init__(self, weights: Mapping[str, float], scoring: ScoringSection, quiet: bool = False) -> None:
        check_names(weights)
        self.weights = dict(weights)
        self._isolated = {
            name: IsolatedFunction(name, scoring.time_limit, scoring.max_concurrent, quiet)
            for name in weights
            if name not in REWARDS
        }

    @property
    def has_own(self) -> bool:
        """Whether a function of the user's is among them."""
        return bool(self._isolated)

    async def score(self, prompt: Prompt, completions: Sequence[Completion], images: Images) -> list[Reward]:
        """One reward for each completion, in order; where a function of the user's failed it is without a total.

        `images` holds the prompt's, which a function of the user's own is given.

        Raises:
            UserError: a function of the user's own cannot be imported.
        """
        values = await asyncio.gather(*(self._values(name, prompt, completions, images) for name in self.weights))
        return [self._weigh(dict(zip(self.weights, of_one, strict=True))) for of_one in zip(*values, strict=True)]

    def load(self) -> None:
        """Wait until the user's own functions are imported.

        Raises:
            UserError: one cannot be.
        """
        asyncio.run(self._all_ready())

    def printed(self) -> list[str]:
        """Who prints, and its first lines, for people."""
        return [
            f"rewards.{name} prints, in training to the reward actor's log:\n    " + "\n    ".join(lines[:PRINTED])
            for name, function in self._isolated.items()
            if (lines := function.printed())
        ]

    def close(self) -> None:
        for function in self._isolated.values():
            function.close()

    async def _all_ready(self) -> None:
        await asyncio.gather(*(function.wait_until_ready() for function in self._isolated.values()))

    async def _values(
        self, name: str, prompt: Prompt, completions: Sequence[Completion], images: Images
    ) -> Sequence[float | str]:
        if name in self._isolated:
            return await self._isolated[name](with_image(prompt, images), completions)
        return [REWARDS[name](prompt, completion) for completion in completions]

    def _weigh(self, values: Mapping[str, float | str]) -> Reward:
        parts = {name: value for name, value in values.items() if not isinstance(value, str)}
        failures = {name: value for name, value in values.items() if isinstance(value, str)}
        total = None if failures else math.fsum(self.weights[name] * value for name, value in parts.items())
        return Reward(total, parts, failures)
