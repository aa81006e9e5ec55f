"""What a ledger says: the result of each check, and what became of every prompt of every epoch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rft_cluster.messages import Reward

TRAINED = "trained"
EQUAL = "equal rewards"  # every advantage of the group is 0, so only the KL, if any, learns from it
MASKED = "masked"  # a reward failed on every completion of the group
LEFT_OUT = "update left out"  # the gradient was not finite
PARTLY = "partly left out"  # some of the step's updates were left out; the records do not tell which
NO_UPDATE = "no update"  # no completion of the step had a token
UNKNOWN = "unknown"  # something is wrong with the record of its step
FATES = (TRAINED, EQUAL, MASKED, LEFT_OUT, PARTLY, NO_UPDATE, UNKNOWN)


@dataclass(frozen=True)
class Check:
    """One thing that was to be proved. `problems`: what is wrong, with its place; empty if it is proved.

    `proved`: what was compared, for people. `cure`: what to do about the problems.
    """

    name: str
    problems: tuple[str, ...]
    proved: str
    cure: str


@dataclass(frozen=True)
class Epoch:
    """The prompts of one epoch, from 1. `fates`: number of prompts by what became of them, see `FATES`.

    `masked`: number of completions without a reward by `REWARD: reason`; most of them are of groups that were trained.
    """

    number: int
    fates: Mapping[str, int]
    masked: Mapping[str, int]

    @property
    def prompts(self) -> int:
        return sum(self.fates.values())


@dataclass(frozen=True)
class Ledger:
    """The ledger of a run. Nothing was lost or done twice if `problems` is empty."""

    folder: Path
    state: str
    """`done`, `stopped` or `in progress`."""
    steps: int
    """Number of recorded steps, of `of` that are to be done."""
    of: int
    checks: tuple[Check, ...]
    epochs: tuple[Epoch, ...] = ()
    redone: tuple[int, ...] = ()
    """Steps that were done again after a fault, ascending, once for each time."""
    replayed: int = 0
    """How many of `redone` have the same completions as before: they came from the journal."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the checkpoints, ascending."""

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(f"{check.name}: {problem}" for check in self.checks for problem in check.problems)

    @property
    def fates(self) -> Counter[str]:
        """Number of prompts of all epochs by what became of them."""
        return sum((Counter(epoch.fates) for epoch in self.epochs), Counter())

    @property
    def masked(self) -> Counter[str]:
        """Number of completions without a reward, by `REWARD: reason`."""
        return sum((Counter(epoch.masked) for epoch in self.epochs), Counter())


def fate(advantages: Sequence[float | None], metrics: Mapping[str, object], updates: int) -> str:
    """What became of a group. `metrics`: its step's row; `updates`: optimizer updates of a step."""
    if all(advantage is None for advantage in advantages):
        return MASKED
    if not any(advantages):
        return EQUAL
    if "learning_rate" not in metrics:
        return NO_UPDATE
    skipped = metrics.get("skipped")
    if not isinstance(skipped, int) or not skipped:
        return TRAINED
    return LEFT_OUT if skipped >= begun(metrics, updates) else PARTLY


def begun(metrics: Mapping[str, object], updates: int) -> int:
    """The optimizer updates of a step with its row `metrics`, those that were left out among them.

    `updates`: how many the configuration has, for a row of an earlier version, which lacks the number.
    """
    own = metrics.get("updates")
    return own if isinstance(own, int) and own else updates


@dataclass
class Account:
    """Counts each (epoch, prompt). `size`: prompts of an epoch."""

    size: int
    _seen: dict[int, Counter[str]] = field(default_factory=dict)
    _fates: dict[int, Counter[str]] = field(default_factory=dict)
    _masked: dict[int, Counter[str]] = field(default_factory=dict)

    def add(self, position: int, example_id: str, fate: str, rewards: Sequence[Reward]) -> None:
        """Enter one group. `position`: number of prompts before it in the run."""
        epoch = position // self.size
        self._seen.setdefault(epoch, Counter())[example_id] += 1
        self._fates.setdefault(epoch, Counter())[fate] += 1
        reasons = [f"{name}: {reason}" for reward in rewards for name, reason in reward.failures.items()]
        self._masked.setdefault(epoch, Counter()).update(reasons)

    def epochs(self) -> tuple[Epoch, ...]:
        return tuple(Epoch(number + 1, self._fates[number], self._masked[number]) for number in sorted(self._fates))

    def seen(self) -> list[tuple[int, Counter[str]]]:
        """(epoch from 1, how often each example was in it)."""
        return [(number + 1, self._seen[number]) for number in sorted(self._seen)]
