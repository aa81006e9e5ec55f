"""The checks of one step: its groups, against the configuration, the manifest, its metrics and its journal.

Each check yields a line for every problem. Text from models, data sets and files is escaped.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rft_cluster.algorithm import ADVANTAGES, TOTALS, load_algorithm
from rft_cluster.algorithm.advantages import is_live
from rft_cluster.common.files import json_object
from rft_cluster.common.text import shown
from rft_cluster.config import Config
from rft_cluster.config.training import ScheduleSection
from rft_cluster.messages import Completion, Group, Prompt, Reward
from rft_cluster.run.asking import most_rounds, wants_more
from rft_cluster.run.journal import identity, read_sealed, scored
from rft_cluster.run.metrics import step_stats, version_spans

Advantages = Callable[[Sequence[Sequence[Reward]]], list[list[float | None]]]
# Figures of a step that follow from its groups alone. The keys of the rewards are added.
FIGURES = {"live_groups", "completion_tokens", "oldest_version", "staleness", "staleness_max", "tokens"}


class Row(BaseModel):
    """A line of a file in `rollouts/` (see `run/rollouts.py`). None: an older version wrote it, without that list."""

    prompt_id: str
    example_id: str
    label: str
    completions: list[str]
    version_spans: list[list[tuple[int, int]]]
    rewards: list[Reward]
    advantages: list[float | None] | None = None
    tokens: list[int] | None = None
    finish_reasons: list[str] | None = None
    logprob_gaps: list[float | None] | None = None
    why: list[str] | None = None

    def lengths(self) -> set[int]:
        """The lengths of its lists; one if it is whole."""
        lists = (self.completions, self.version_spans, self.rewards)
        later = (self.advantages, self.tokens, self.finish_reasons, self.logprob_gaps, self.why)
        return {len(entries) for entries in (*lists, *later) if entries is not None}


@dataclass(frozen=True)
class Step:
    """The record of one step. `number` is from 1, as people see it; `prompts` are those that were due."""

    number: int
    rows: list[Row]
    prompts: list[Prompt]


def groups_in(journalled: Path) -> int:
    """The number of groups in a step's file of the journal; 0 of what is no file."""
    return len(journalled.read_bytes().splitlines()) - 1 if journalled.is_file() else 0


def read_rollouts(file: Path, schedule: ScheduleSection, group_size: int) -> tuple[list[Row], list[str]]:
    """The groups of a step, and what is wrong with the file."""
    rows: list[Row] = []
    problems: list[str] = []
    where = f"rollouts/{file.name}"
    if file.is_symlink() or not file.is_file():
        return [], [f"{where} is not a file"]
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = Row.model_validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            what = shown(".".join(map(str, first["loc"])))[:60] or "line"
            problems.append(f"{where}, line {number} is damaged: {what}: {first['msg'][:100]}")
            continue
        rows.append(row)
        if (lengths := row.lengths()) != {group_size}:
            found = " or ".join(map(str, sorted(lengths)))
            problems.append(f"{where}, line {number} has {found} completions, and {group_size} were due")
    size = schedule.prompts_per_step
    if not problems and len(rows) not in range(size, most_rounds(schedule) * size + 1, size):
        problems.append(f"{where} has {len(rows)} groups, and schedule.prompts_per_step is {size}")
    return rows, problems


def further_problems(step: Step, advantages: Advantages, config: Config) -> Iterator[str]:
    """Compare the further rounds of prompts with those that `schedule.min_live` asks for. Advantages of a function of
    the user's own are not known here, so those steps are not judged."""
    if not is_built_in(config):
        return
    size, rewards = config.schedule.prompts_per_step, [row.rewards for row in step.rows]
    for groups in range(size, len(rewards), size):
        if not wants_more(rewards[:groups], advantages, config.schedule):
            yield f"step {step.number}: further prompts were asked after {groups} groups, which had enough live ones"
    if wants_more(rewards, advantages, config.schedule):
        yield f"step {step.number}: too few of its {len(rewards)} groups are live, and no further prompts were asked"


def order_problems(step: Step) -> Iterator[str]:
    """Compare a step's prompts with those that were due: none missing, none twice, none in another place."""
    due = {prompt.prompt_id: (place, prompt) for place, prompt in enumerate(step.prompts)}
    found = Counter(row.prompt_id for row in step.rows)
    where = f"step {step.number}"
    yield from (f"{where}: prompt {prompt_id} is missing" for prompt_id in due if not found[prompt_id])
    for prompt_id, times in found.items():
        if prompt_id not in due:
            yield f"{where}: prompt {shown(prompt_id)} is none of this step"
        elif times > 1:
            yield f"{where}: prompt {prompt_id} is there {times} times"
    known = [(row, *due[row.prompt_id]) for row in step.rows if row.prompt_id in due]
    for (_, earlier, before), (_, later, after) in pairwise(known):
        if later < earlier:
            yield f"{where}: prompt {after.prompt_id} stands after {before.prompt_id}"
    for row, _, prompt in known:
        if (row.example_id, row.label) != (prompt.example_id, prompt.label):
            yield (
                f"{where}, prompt {prompt.prompt_id}: example {shown(row.example_id)} ({shown(row.label)}) where "
                f"{shown(prompt.example_id)} ({shown(prompt.label)}) was due"
            )


def reward_problems(step: Step, weights: Mapping[str, float]) -> Iterator[str]:
    """Compare each total with the weighted sum of its rewards; a completion without a total must say which failed."""
    for row in step.rows:
        for number, reward in enumerate(row.rewards, 1):
            if problem := _reward_problem(reward, weights):
                yield f"step {step.number}, prompt {shown(row.prompt_id)}, completion {number}: {problem}"


def _reward_problem(reward: Reward, weights: Mapping[str, float]) -> str:
    if reward.parts.keys() | reward.failures.keys() != weights.keys() or reward.parts.keys() & reward.failures.keys():
        names = shown(", ".join([*reward.parts, *reward.failures]))
        return f"has rewards {names or 'none'}, and rewards are {shown(', '.join(weights))}"
    if reward.failures:
        return "" if reward.total is None else f"total {reward.total:g}, although a reward failed"
    total = math.fsum(weights[name] * value for name, value in reward.parts.items())
    if reward.total is None or not math.isfinite(reward.total) or not _equal(reward.total, total):
        return f"total {reward.total}, and the weighted sum of its rewards is {total:g}"
    return ""


def staleness_problems(step: Step, most: int, max_tokens: int) -> Iterator[str]:
    """Compare the weights that wrote each completion with the policy at the start of the step, version `number - 1`."""
    for row in step.rows:
        written = [sum(tokens for _, tokens in spans) for spans in row.version_spans]
        for number, (spans, tokens) in enumerate(zip(row.version_spans, row.tokens or written, strict=True), 1):
            problem = _span_problem(spans, step.number - 1, most, max_tokens)
            if not problem and tokens != written[number - 1]:
                problem = f"has {tokens} tokens, and its versions wrote {written[number - 1]}"
            if problem:
                yield f"step {step.number}, prompt {shown(row.prompt_id)}, completion {number}: {problem}"


def _span_problem(spans: Sequence[tuple[int, int]], newest: int, most: int, max_tokens: int) -> str:
    """`spans`: (version, number of tokens) of a completion in order; `newest`: version of the policy."""
    versions, tokens = [version for version, _ in spans], [number for _, number in spans]
    if not spans or versions != sorted(versions) or min(tokens) < 0 or sum(tokens) > max_tokens:
        return f"versions and tokens {str(spans)[:60]} are impossible with sampling.max_tokens {max_tokens}"
    if versions[-1] > newest:
        return f"version {versions[-1]} wrote it, and the policy was of version {newest}"
    if newest - versions[0] > most:
        return f"version {versions[0]} is {newest - versions[0]} steps old, and schedule.max_staleness is {most}"
    return ""


def figure_problems(
    step: Step, metrics: Mapping[str, Any], advantages: Sequence[Sequence[float | None]], config: Config
) -> Iterator[str]:
    """Compute from the groups what `metrics.jsonl` says of the step, and compare."""
    groups = [
        Group(prompt, [], [_completion(*one) for one in zip(row.completions, row.version_spans, strict=True)])
        for prompt, row in zip(step.prompts, step.rows, strict=True)
    ]
    rewards = [row.rewards for row in step.rows]
    if not any(reward.total is not None for own in rewards for reward in own):
        yield f"step {step.number}: no completion has a reward, after which the run would have ended"
        return
    if is_built_in(config):
        yield from _advantage_problems(step, advantages)
    stats = step_stats(step.number, groups, rewards, advantages, None, {"all": 1.0}).row()
    known = FIGURES if is_built_in(config) else FIGURES - {"live_groups"}
    for key, value in stats.items():
        if key in known or key.split("/")[0] in ("reward", "reward_failures"):
            told = metrics.get(key)
            if not isinstance(told, int | float) or not _equal(told, value):
                had = "not" if told is None else shown(str(told))[:40]
                yield f"step {step.number}: {shown(key)} is {had} in metrics.jsonl, and {value:g} by its completions"


def _advantage_problems(step: Step, advantages: Sequence[Sequence[float | None]]) -> Iterator[str]:
    for row, due in zip(step.rows, advantages, strict=True):
        for number, (told, own) in enumerate(zip(row.advantages or due, due, strict=True), 1):
            if told != own if told is None or own is None else not _equal(told, own):
                where = f"step {step.number}, prompt {shown(row.prompt_id)}, completion {number}"
                yield f"{where}: advantage {told}, and by the rewards of its group {own}"


def _completion(text: str, spans: list[tuple[int, int]]) -> Completion:
    return Completion([0] * sum(tokens for _, tokens in spans), [], text, "", spans[0][0], tuple(spans))


def is_built_in(config: Config) -> bool:
    """Return True if the run's advantages can be computed here. A function of the user's own is not run: it may be a
    stranger's."""
    chosen = config.algorithm
    return not chosen.samples or (chosen.total in TOTALS and chosen.advantage in ADVANTAGES)


def advantages_of(config: Config) -> Advantages:
    """The function from rewards to advantages; unless it is built in, one that is 0 where the totals are equal."""
    if not is_built_in(config):
        return _live
    built_in = config.algorithm.model_copy(update={"normaliser": "completion"})  # it does not change an advantage
    return load_algorithm(config.model_copy(update={"algorithm": built_in})).advantages


def _live(rewards: Sequence[Sequence[Reward]]) -> list[list[float | None]]:
    totals = [[reward.total for reward in group if reward.total is not None] for group in rewards]
    return [
        [None if reward.total is None else float(is_live(own)) for reward in group]
        for group, own in zip(rewards, totals, strict=True)
    ]


def journal_problems(step: Step, file: Path, settings: str | None, questions: set[str]) -> Iterator[str]:
    """Compare a step's journal with its seal, the run's `settings`, the prompts that were due, and `rollouts/`.

    `settings`: None for a step that may be of other settings. `questions`: gets the SHA-256 of the step's questions.
    """
    where = f"journal/{file.name}"
    if file.is_symlink() or not file.is_file():
        yield f"{where} is not a file"
        return
    try:
        sealed_for, body = read_sealed(file)
    except ValueError as error:
        yield f"{where} is damaged: {error}"
        return
    if settings is not None and sealed_for != settings:
        yield f"{where} is of other settings than config.yaml (SHA-256 {shown(sealed_for)[:12]}, not {settings[:12]})"
    lines = body.splitlines()
    if len(lines) != len(step.prompts):
        yield f"{where} has {len(lines)} groups, and schedule.prompts_per_step is {len(step.prompts)}"
        return
    rows = {row.prompt_id: row for row in step.rows}
    for number, (line, prompt) in enumerate(zip(lines, step.prompts, strict=True)):
        try:
            row = json_object(line) or {}
            told, question = row["prompt"][:-1], row["prompt"][-1]
            completions, rewards = scored(row)
            spans = [version_spans(one) for one in completions]
            pairs = list(zip(spans, completions, strict=True))
        except (LookupError, TypeError, ValueError):
            yield f"{where}, group {number + 1} is not what a run writes"
            continue
        questions.add(str(question))
        if told != identity(prompt)[:-1]:
            yield f"{where}, group {number + 1} is of another prompt than {prompt.prompt_id}: {shown(str(told))[:100]}"
        if any(sum(tokens for _, tokens in own) != len(one.token_ids) for own, one in pairs):
            yield f"{where}, group {number + 1} has other tokens than its versions say"
        row_there = rows.get(prompt.prompt_id)
        if row_there and (found := _differences(row_there, completions, spans, rewards)):
            yield f"{where}, group {number + 1} ({prompt.prompt_id}) has other {found} than rollouts/"


def _differences(row: Row, completions: Sequence[Completion], spans: Sequence[Any], rewards: Sequence[Reward]) -> str:
    pairs = {
        "texts": (row.completions, [one.text for one in completions]),
        "versions": (row.version_spans, [list(own) for own in spans]),
        "rewards": (row.rewards, rewards),
        "finish reasons": (row.finish_reasons, row.finish_reasons and [one.finish_reason for one in completions]),
    }
    return " and ".join(name for name, (ours, theirs) in pairs.items() if ours != theirs)


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
