"""Detect a run with nothing left to learn from. Otherwise a policy that earns nothing would train on to the end."""

from collections.abc import Sequence

from rft_cluster.algorithm.advantages import is_live
from rft_cluster.messages import Group, Reward

BUILT_IN = ("format", "accuracy", "containment")  # rewards with a known maximum of 1
SAID_AFTER = 3  # consecutive steps before a warning; the run ends later
# With fewer completions a class, all may be wrong by bad luck. With 10 a class the chance of that is about e^-10.
GUESSES_A_CLASS = 10

GO_ON = (
    "Begin again under another run.name with that changed, or go on as it is with --resume schedule.stop_when_stuck=0"
)


class Stuck:
    """Counts consecutive steps that teach nothing: the format is lost, all rewards are equal and not the best, or the
    gradient is not finite."""

    def __init__(self, limit: int, classes: int) -> None:
        """`limit`: `schedule.stop_when_stuck`, 0 for never. `classes`: number of possible answers."""
        self._limit, self._classes = limit, classes
        self._steps = self._completions = self._not_finite = 0
        self._had_format = False

    def see(
        self, groups: Sequence[Group], rewards: Sequence[Sequence[Reward]], live: bool, skipped: int | None = 0
    ) -> str:
        """Add one step. Returns the reason to end the run, or "" to go on.

        `live`: True if some advantage of the step is not 0. `skipped`: optimizer updates that were left out, because
        the gradient was not finite.
        """
        self._not_finite = self._not_finite + 1 if skipped else 0
        if self._limit and self._not_finite >= self._limit:
            return (
                f"in each of the last {self._not_finite} steps the gradient was infinite or not a number, and the "
                f"update was left out. Lower optimizer.learning_rate"
            )
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
            print(f"note: {said}; after {self._limit} such steps the run ends (schedule.stop_when_stuck)", flush=True)
        return ""

    def _format_is_lost(self, every: Sequence[Reward], live: bool) -> bool:
        """True if no completion has the format, and either some had it before or nothing else is left to learn from."""
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
    return not is_live(totals) and not solved
