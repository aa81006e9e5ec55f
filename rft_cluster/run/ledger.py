"""The ledger of a run: what its folder proves, from the files alone.

    ledger = check_run(Path("runs/digits"))
    ledger.problems            # () if nothing was lost and nothing was done twice
    ledger.fates["trained"]    # prompts

Nothing is written, no function of the user's is run, and no text of a record is followed as a path. A run may be read
while it is written.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rft_cluster.classification.card import Card
from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.config import Config
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.manifest import read_manifest
from rft_cluster.messages import Example, ImageRef, Prompt
from rft_cluster.prompts import make_prompts
from rft_cluster.run.asking import most_rounds
from rft_cluster.run.checkpoints import State
from rft_cluster.run.history import check_is_run
from rft_cluster.run.journal import FOLDER, settings_digest, step_files
from rft_cluster.run.lock import holder
from rft_cluster.run.parts import FILE as PARTS
from rft_cluster.run.proof import kept, steps
from rft_cluster.run.proof.account import UNKNOWN, Account, Check, Epoch, Ledger, fate
from rft_cluster.run.resume import check_kinds, read_saved_config
from rft_cluster.run.saving import MODEL

__all__ = ["Check", "Epoch", "Ledger", "check_run"]

Problems = dict[str, list[str]]
# What to do about the problems of each check, in the order in which they are shown.
CURES = {
    "settings": "bring the file back from a copy: without it nothing else can be proved",
    "steps": "bring metrics.jsonl back from a copy",
    "evaluations": "bring eval.jsonl back from a copy; rft_cluster.evaluate measures an exported model again",
    "rollouts": "bring the file back from a copy",
    "prompts": "bring the file back from a copy; if nobody has changed it, do not use the run's model",
    "rewards": "bring the file back from a copy; if nobody has changed it, do not use the run's model",
    "staleness": "bring the file back from a copy; if nobody has changed it, do not use the run's model",
    "journal": "bring the file back from a copy; a run that resumes generates its step and those after it again",
    "checkpoints": "remove a damaged one: a run that resumes takes the one before, and the journal. If the updates "
    "are not those of the records, do not use the run's model",
    "models": "resume the run, which exports its last policy again",
    "leftovers": "resume the run, which removes them, or remove them",
}


def check_run(folder: Path) -> Ledger:
    """Read a run's folder and check everything. Takes seconds, and longer for checkpoints of many GB.

    Raises:
        UserError: it is not the folder of a run.
    """
    check_is_run(folder, "--run: ")
    check_kinds(folder)
    ledger = make_ledger(folder)
    if ledger.problems and holder(folder):
        # Files have moved while they were read. What is really wrong is wrong the second time, too.
        again = set(make_ledger(folder).problems)
        checks = [
            replace(check, problems=tuple(one for one in check.problems if f"{check.name}: {one}" in again))
            for check in ledger.checks
        ]
        ledger = replace(ledger, checks=tuple(checks))
    return ledger


@dataclass(frozen=True)
class Run:
    """A run's folder, read once."""

    folder: Path
    config: Config
    former: dict[int, Config]
    """See `kept.read_former`."""
    dataset: FewShotDataset
    metrics: kept.Rows
    damaged: list[str]
    """What is wrong with lines of `metrics.jsonl`."""
    cut: bool
    """Whether its last line is cut."""
    cards: dict[str, Card]
    states: dict[int, State | None]
    redone: list[int]
    replayed: int
    drawn: bool
    """Whether each prompt lists the classes in an order of its own, so that their texts differ."""

    @cached_property
    def recorded(self) -> list[int]:
        return [row["step"] for row in self.metrics]

    @cached_property
    def last(self) -> int:
        """The last recorded step."""
        return max(self.recorded, default=0)

    @property
    def furthest(self) -> int:
        """The last step that was ever recorded: while steps are done again, the journal and a best model are ahead."""
        return max([self.last, *self.redone])

    @cached_property
    def newest_whole(self) -> int:
        """The step of the newest checkpoint that is whole; 0 without any."""
        return max((step for step, state in self.states.items() if state), default=0)

    @property
    def is_done(self) -> bool:
        return MODEL in self.cards and self.cards[MODEL].steps == self.steps_due == self.last

    @property
    def steps_due(self) -> int:
        return self.config.schedule.steps

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of the splits that are evaluated."""
        return {split: len(examples) for split, examples in self.dataset.splits.items() if split != "train"}

    def prompts(self, step: int, groups: int) -> list[Prompt]:
        """The prompts that are due in a step, from 1, and those of as many further rounds as `groups` have. Their
        question is not known here, and left empty."""
        size, seed = self.config.schedule.prompts_per_step, self.config.run.seed
        rounds = min(max(1, math.ceil(groups / size)), most_rounds(self.config.schedule))
        return [
            prompt
            for number in range(rounds)
            for prompt in make_prompts(
                self.dataset.batch(seed, step - 1, size, number), "", "train", step - 1, seed, number * size
            )
        ]


def make_ledger(folder: Path) -> Ledger:
    """The ledger of the folder of a run."""
    problems: Problems = {name: [] for name in CURES}
    try:
        run = _opened(folder, problems)
    except UserError as error:
        problem = shown(str(error).replace("\n", "; "))
        return Ledger(folder, "not readable", 0, 0, (Check("settings", (problem,), "", CURES["settings"]),))
    account = _check_groups(run, problems)
    _check_records(run, problems)
    _check_kept(run, problems)
    proved = _proved(run)
    return Ledger(
        folder=folder,
        state=_state(run),
        steps=run.last,
        of=run.steps_due,
        checks=tuple(Check(name, tuple(problems[name]), proved[name], CURES[name]) for name in CURES),
        epochs=account.epochs(),
        redone=tuple(run.redone),
        replayed=run.replayed,
        checkpoints=tuple(run.states),
    )


def _opened(folder: Path, problems: Problems) -> Run:
    """Raises UserError if the run's settings cannot be read: nothing can be compared then."""
    config, former = read_saved_config(folder / "config.yaml"), kept.read_former(folder)
    dataset = replace(_dataset(folder / "manifest.json"), augment=config.data.augment)
    metrics, damaged, cut = kept.read_lines(folder / "metrics.jsonl")  # first, since others may be written meanwhile
    cards, problems["models"] = kept.read_models(folder)
    redone, replayed, problems["steps"] = kept.read_redone(folder)
    states, problems["checkpoints"] = kept.read_checkpoints(folder)
    drawn = any(row.get("template") for row in kept.read_lines(folder / PARTS)[0])
    return Run(folder, config, former, dataset, metrics, damaged, cut, cards, states, redone, replayed, drawn)


def _dataset(manifest: Path) -> FewShotDataset:
    """The data set of a manifest, without its images."""
    found = read_manifest(manifest)
    train, validation, test = (
        [Example(ImageRef(entry["id"], entry["sha256"]), entry["label"]) for entry in found["splits"][split]]
        for split in ("train", "validation", "test")
    )
    return FewShotDataset(found["name"], found["classes"], train, validation, test, pool=[], images={})


def _check_groups(run: Run, problems: Problems) -> Account:
    """Check each step's groups, and enter them into an account."""
    account, questions = Account(len(run.dataset.train)), {s.prompt_sha256 for s in run.states.values() if s}
    advantages = steps.advantages_of(run.config)
    metrics = {row["step"]: row for row in run.metrics}
    rollouts, journal = step_files(run.folder / "rollouts"), step_files(run.folder / FOLDER)
    for first, last in kept.spans_of(metrics.keys() - rollouts.keys()):
        problems["rollouts"].append(f"rollouts/: {kept.steps_are(first, last)} missing")
    in_flight = run.last + 1  # its completions are written before its figures
    beyond = {step for step in rollouts if step > run.last and (step != in_flight or in_flight > run.steps_due)}
    for first, last in kept.spans_of(beyond):
        problems["rollouts"].append(
            f"rollouts/: {kept.steps_are(first, last)} there, and not recorded in metrics.jsonl"
        )
    for number in sorted(rollouts.keys() | journal.keys()):
        step = steps.Step(number, [], run.prompts(number, steps.groups_in(journal[number]) if number in journal else 0))
        if number in rollouts.keys() - beyond:
            step, is_whole = _check_rollouts(run, step, rollouts[number], problems)
            found = None
            if is_whole and number in metrics:
                found = advantages([row.rewards for row in step.rows])
                problems["rewards"] += steps.figure_problems(step, metrics[number], found, run.config)
                problems["prompts"] += steps.further_problems(step, advantages, run.config)
            if number != in_flight:
                _enter(run, step, metrics.get(number, {}), found, account)
        if number in journal:
            # A run that goes on with more steps has other settings than its steps before. It never uses those again.
            settings = settings_digest(run.config) if number > run.newest_whole else None
            asked: set[str] = set() if run.drawn else questions
            problems["journal"] += steps.journal_problems(step, journal[number], settings, asked)
    if len(questions) > 1:
        problems["journal"].append(f"its steps and the checkpoints ask {len(questions)} different questions")
    problems["prompts"] += _epoch_problems(run, account)
    return account


def _check_rollouts(run: Run, step: steps.Step, file: Path, problems: Problems) -> tuple[steps.Step, bool]:
    """The step with its groups, and whether nothing is wrong with them."""
    schedule, sampling = run.config.schedule, run.config.sampling
    rows, damaged = steps.read_rollouts(file, schedule, run.config.completions)
    step = replace(step, rows=rows, prompts=run.prompts(step.number, len(rows)))
    wrong = {
        "rollouts": damaged,
        "prompts": list(steps.order_problems(step)),
        "rewards": list(steps.reward_problems(step, run.config.scored)),
        "staleness": list(steps.staleness_problems(step, schedule.max_staleness, sampling.max_tokens)),
    }
    for name, found in wrong.items():
        problems[name] += found
    return step, not any(wrong.values())


def _enter(
    run: Run,
    step: steps.Step,
    metrics: Mapping[str, Any],
    advantages: list[list[float | None]] | None,
    account: Account,
) -> None:
    """Enter a step's groups. `advantages`: None if the step is damaged, so that their fate is not known."""
    places = {prompt.prompt_id: index for index, prompt in enumerate(step.prompts)}
    size = run.config.schedule.prompts_per_step
    start = (step.number - 1) * size
    for number, row in enumerate(step.rows):
        if places.get(row.prompt_id, size) < size:  # those of further rounds are in no epoch
            updates = run.config.algorithm.updates_per_step
            became = fate(advantages[number], metrics, updates) if advantages else UNKNOWN
            account.add(start + places[row.prompt_id], row.example_id, became, row.rewards)


def _epoch_problems(run: Run, account: Account) -> Iterator[str]:
    """Check that each example is in each epoch once, whatever order was due; in the last one at most once."""
    names = [example.example_id for example in run.dataset.train]
    done = run.last * run.config.schedule.prompts_per_step // len(names)  # whole epochs
    for epoch, found in account.seen():
        missing = [name for name in names if not found[name]] if epoch <= done else []
        twice = [name for name in names if found[name] > 1]
        if missing:
            yield f"epoch {epoch}: {len(missing)} examples are missing (first {shown(missing[0])})"
        if twice:
            yield f"epoch {epoch}: {len(twice)} examples are there twice (first {shown(twice[0])})"


def _check_records(run: Run, problems: Problems) -> None:
    problems["steps"] += [*run.damaged, *kept.step_problems(run.recorded, run.steps_due)]
    rows, damaged, _ = kept.read_lines(run.folder / "eval.jsonl")
    due = kept.due_evaluations(run.former, run.config, run.sizes, run.recorded, run.is_done)
    problems["evaluations"] += [*damaged, *kept.evaluation_problems(rows, due, run.sizes, run.last)]
    if run.is_done and run.redone and run.redone[-1] > run.last:
        problems["steps"].append(f"step {run.redone[-1]} was to be done again, and is not recorded")


def _check_kept(run: Run, problems: Problems) -> None:
    updates = run.config.algorithm.updates_per_step
    problems["checkpoints"] += kept.checkpoint_problems(run.states, run.metrics, run.cut, updates)
    if run.is_done and run.states and max(run.states) != run.last:
        problems["checkpoints"].append(f"none is of the last step, {run.last}")
    for name, card in run.cards.items():
        if card.steps > run.furthest:
            problems["models"].append(f"{name}/ is of step {card.steps}, and the last recorded step is {run.last}")
    if run.states or not run.is_done:  # of a run that is done, somebody may have removed what it no longer needs
        oldest, in_flight = min(run.states, default=0), run.furthest + 1
        if (run.folder / FOLDER).is_dir():
            problems["journal"] += kept.coverage_problems(step_files(run.folder / FOLDER), oldest, run.last, in_flight)
        else:
            problems["journal"].append("journal/ is not there: it was removed, or an older version wrote the run")
    if not holder(run.folder):
        problems["leftovers"] += kept.leftovers(run.folder)


def _state(run: Run) -> str:
    return "in progress" if holder(run.folder) else "done" if run.is_done else "stopped"


def _proved(run: Run) -> dict[str, str]:
    """What each check has compared, for people."""
    schedule, files = run.config.schedule, step_files(run.folder / FOLDER)
    sizes = " or ".join(str(number * schedule.prompts_per_step) for number in range(1, 1 + most_rounds(schedule)))
    journal = ", ".join(f"{first} to {last}" for first, last in kept.spans_of(files))
    return {
        "settings": "config.yaml and manifest.json are whole",
        "steps": f"{len(run.recorded)} of {schedule.steps} recorded, each once and in order",
        "evaluations": "each that was due once",
        "rollouts": f"{sizes} groups of {run.config.completions} completions a step",
        "prompts": f"{len(run.dataset.train)} examples, each once an epoch, in the order of seed {run.config.run.seed}",
        "rewards": "each total follows from its rewards, and the figures of each step from its completions",
        "staleness": f"at most {schedule.max_staleness} steps",
        "journal": f"steps {journal}: sealed, and equal to rollouts/" if journal else "no step",
        "checkpoints": f"of step {', '.join(map(str, run.states))}: whole" if run.states else "none",
        "models": ", ".join(f"{name}/ of step {card.steps}" for name, card in run.cards.items()) or "none yet",
        "leftovers": "none",
    }
