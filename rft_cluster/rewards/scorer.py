"""The reward role: score groups of completions with the configured reward functions.

scorer = Scorer({"format": 1.0, "accuracy": 1.0}, ScoringSection(), images)
rewards = await scorer.score(groups)      # rewards[i][j] is of groups[i].completions[j]

Calls of `score` overlap: a step comes in chunks, as generators finish them. The completions of all chunks together
share the limit `scoring.max_concurrent`.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Completion, Group, Images, Prompt, Reward
from rft_cluster.rewards import REWARDS, check_names, with_image
from rft_cluster.rewards.isolation import IsolatedFunction

PRINTED = 3  # lines shown of a function's output


class Scorer:
    """Scores completions. `weights`: of the rewards, by name or dotted path."""

    def __init__(self, rewards: dict[str, float], scoring: ScoringSection, images: Images) -> None:
        self._rewards, self._images = WeightedRewards(rewards, scoring), images
        self._budget = scoring.failure_budget

    async def score(self, groups: list[Group], completions: int | None = None) -> list[list[Reward]]:
        """One reward for each completion, in order. A completion is masked (no total) if a user's function failed on
        it.

        Args:
            completions: number in the whole step, if `groups` are a chunk of it; the failure budget refers to this.

        Raises:
            UserError: more completions failed than the budget allows (raised as soon as that is certain), or a function
                cannot be imported.
        """
        completions = completions or sum(len(group.completions) for group in groups)
        started = time.monotonic()
        scored: list[list[Reward]] = []
        if self._rewards.has_own:
            # Fetch in a thread: images on another host may take a while, and other chunks continue meanwhile.
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
        # This goes to the actor's log, which Ray keeps.
        first = groups[0].prompt.prompt_id if groups else "-"
        seconds = time.monotonic() - started
        print(f"score: {len(groups)} groups from {first} on, {mean}, {seconds:.1f} s", flush=True)
        for name, count in Counter(name for group in scored for one in group for name in one.failures).items():
            print(
                f"WARNING: rewards.{name} failed on {count} completions, which are left out of the update: see its "
                f"messages above, or raise scoring.time_limit",
                flush=True,
            )
        return scored

    def close(self) -> None:
        """End the processes of the user's own functions."""
        self._rewards.close()


def check_failures(
    groups: Sequence[Group], scored: Sequence[Sequence[Reward]], completions: int, budget: float
) -> None:
    """Check that at most a `budget` share of a step's `completions` failed. `scored` may be shorter than `groups`.

    Raises:
        UserError: more failed; the message names the reward that fails most, with its first reason.
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
        f"Fix the function, or raise scoring.time_limit or scoring.failure_budget"
    )


class WeightedRewards:
    """Built-in rewards run in this process. Each user's own function runs in its own process, which `close` ends.

    Args:
        weights: of the rewards, by name or dotted path.
        quiet: keep the functions' output for `printed`.

    Raises:
        UserError: a name is neither a built-in reward nor a dotted path.
    """

    def __init__(self, weights: Mapping[str, float], scoring: ScoringSection, quiet: bool = False) -> None:
        check_names(weights)
        self.weights = dict(weights)
        self._isolated = {
            name: IsolatedFunction(name, scoring.time_limit, scoring.max_concurrent, quiet, scoring.load_limit)
            for name in weights
            if name not in REWARDS
        }

    @property
    def has_own(self) -> bool:
        """True if one of the rewards is a user's own function."""
        return bool(self._isolated)

    async def score(self, prompt: Prompt, completions: Sequence[Completion], images: Images) -> list[Reward]:
        """One reward for each completion, in order; masked (no total) if a user's own function failed.

        `images`: has the prompt's image, for a user's own function.

        Raises:
            UserError: a user's own function cannot be imported.
        """
        values = await asyncio.gather(*(self._values(name, prompt, completions, images) for name in self.weights))
        return [self._weigh(dict(zip(self.weights, of_one, strict=True))) for of_one in zip(*values, strict=True)]

    def load(self) -> None:
        """Wait until the user's own functions are imported.

        Raises:
            UserError: a function cannot be imported.
        """
        asyncio.run(self._all_ready())

    def printed(self) -> list[str]:
        """Notes for the user: the functions that print, with their first lines."""
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
