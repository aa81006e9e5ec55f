"""While it runs: is there still anything to learn from? A policy that earns nothing trains on to the end otherwise."""

import math
from collections.abc import Sequence

from rft_cluster.messages import Group, Reward

BUILT_IN = ("format", "accuracy", "containment")  # whose best is 1; of others it is not known
SAID_AFTER = 3  # such steps in a row it is said, before it ends the run
# With fewer completions a class, wrong answers alone may be bad luck: 10 a class are all wrong by chance once in e^10.
GUESSES_A_CLASS = 10

GO_ON = (
    "Begin again under another run.name with that changed, or go on as it is with --resume schedule.stop_when_stuck=0"
)


class Stuck:
    """Counts the steps in a row that teach nothing: the format is lost, or all rewards are equal and not the best."""

    def __init__(self, limit: int, classes: int) -> None:
        """`limit` is `schedule.stop_when_stuck`; with 0 nothing is said. `classes` is how many answers there are."""
        self._limit, self._classes = limit, classes
        self._steps = self._completions = 0
        self._had_format = False

    def see(self, groups: Sequence[Group], rewards: Sequence[Sequence[Reward]], live: bool) -> str:
        """Look at one more step. Returns why the run should end, for its user; nothing while it should go on.

        `live`: some advantage of the step is not 0.
        """
        every = [reward for group in rewards for reward in group if reward.total is not None]
        lost = self._format_is_lost(every, live)
        if not (lost or (not live and _equal_and_not_the_best(every))):
            self._steps = self._completions = 0
            return ""
        self._steps += 1
        self._completions += len(every)
        what = "no completion had the format of the question" if lost else f"every reward was {every[0].total:.2f}"
        said = f"in the last {self._steps} steps {what}: there is nothing to learn from"
        if not self._limit:
            return ""
        if self._steps >= self._limit and (lost or self._completions >= GUESSES_A_CLASS * self._classes):
            return f"{said}. {self._cause(groups, lost)}"
        if self._steps == SAID_AFTER:
            print(f"note: {said}; from {self._limit} such steps on the run ends (schedule.stop_when_stuck)", flush=True)
        return ""

    def _format_is_lost(self, every: Sequence[Reward], live: bool) -> bool:
        """Nobody has the format: though it was there before, or with nothing else to learn from."""
        formats = [reward.parts["format"] for reward in every if "format" in reward.parts]
        if not formats or any(formats):
            self._had_format = self._had_format or bool(formats)
            return False
        return self._had_format or not live

    def _cause(self, groups: Sequence[Group], lost: bool) -> str:
        reasons = [completion.finish_reason for group in groups for completion in group.completions]
        cut = reasons.count("length") / len(reasons)
        if cut > 0.5:
            return f"{100 * cut:.0f} % of the completions were cut: raise sampling.max_tokens"
        if lost and self._had_format:
            return "It was there before, so the steps were too large: lower optimizer.learning_rate"
        return "Look at what was written (rollouts/), and whether the question asks for what the rewards read"


def _equal_and_not_the_best(every: Sequence[Reward]) -> bool:
    totals = [reward.total for reward in every if reward.total is not None]
    known = [value for reward in every for name, value in reward.parts.items() if name in BUILT_IN]
    solved = bool(known) and all(value == 1.0 for value in known)
    return math.isclose(min(totals), max(totals), rel_tol=1e-9, abs_tol=1e-12) and not solved
