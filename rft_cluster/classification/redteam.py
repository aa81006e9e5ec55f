"""Red team: before training, try the configured rewards on answers that ignore the image (pure).

A reward that pays for such an answer teaches the policy that answer. For each of the user's labels

    s = (R(attack) - R(wrong)) / (R(right) - R(wrong)),    at least 0

where R is the total reward, R(right) that of the label in the layout that the prompt asks for, and R(wrong) the median
of the other classes in that layout. An attack's score is the mean of s over n labels. Under a sound reward, always
answering one class scores 1/n (chance), and every other attack about 0.
"""

import asyncio
import random
import re
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase
from typing import Any

from rft_cluster.classification.earnable import REASONING, cure, obedient, what_it_shows
from rft_cluster.common.errors import UserError
from rft_cluster.common.text import printable
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Completion, Example, Images, Prompt, Reward
from rft_cluster.prompts import Question, asks_for_thinking
from rft_cluster.rewards.scorer import WeightedRewards

MARGIN = 0.10  # tolerated above chance: a small reward for brevity pays for an empty answer but does no harm
MOST = 200  # labels, and constant answers
TIME = 60.0  # seconds after which no further label is tried
SHOWN = 12  # attacks in the table
NAME = 44  # characters of its first column
Score = Callable[[Prompt, Sequence[Completion]], Awaitable[list[Reward]]]
ALWAYS = "always "  # begins the name of an attack that answers one class


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack's result. `score`: the mean of s over the labels. `parts`: each reward's unweighted mean, None if the
    reward failed on all labels."""

    name: str
    score: float
    parts: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class RedTeam:
    """The results of a red team.

    `attacks`: highest score first; empty if no label counts.
    `labels`: how many labels count. `chance`: 1 / labels.
    `notes`: caveats to print.
    `unearned`: why following the question earns nothing; empty if it earns something.
    """

    attacks: list[Attack]
    labels: int
    chance: float
    notes: list[str]
    unearned: str = ""

    @property
    def paid(self) -> list[Attack]:
        """The attacks that score more than `MARGIN` above chance."""
        return [attack for attack in self.attacks if attack.score > self.chance + MARGIN + 1e-9]


def check_rewards(
    rewards: WeightedRewards,
    scoring: ScoringSection,
    classes: Sequence[str],
    examples: Sequence[Example],
    images: Images,
    question: Question,
    seed: int,
) -> str:
    """Red-team the rewards as `scoring.red_team` says. Returns the findings as text; empty if it is off.

    Raises:
        UserError: a reward cannot be imported; or, with `refuse`, an attack pays or following the question earns
            nothing.
    """
    if scoring.red_team == "off":
        return ""
    found = asyncio.run(red_team(rewards, classes, examples, images, question, seed, scoring.red_team_calls))
    if scoring.red_team == "warn":
        return "\n".join(filter(None, (render(found), found.unearned)))
    if not found.labels:
        raise UserError(
            "the rewards give a right answer no more than a wrong one, with every label that was tried: nothing could "
            "be learned from them. Give a reward that tells the two apart a weight above 0, e.g. rewards.accuracy=1; "
            "scoring.red_team=warn trains anyway"
        )
    if found.unearned:
        raise UserError(
            f"{found.unearned}. Take prompt.template=think_answer, or {cure(question.text)}\n"
            f"scoring.red_team=warn trains anyway"
        )
    if not found.paid:
        return render(found)
    raise UserError(
        f"the rewards pay for answers that ignore the image, and a policy would learn to give them:\n"
        f"{render(found)}\nTake rewards.accuracy in place of the one that pays, or weigh it down; "
        f"scoring.red_team=warn trains anyway"
    )


async def red_team(
    rewards: WeightedRewards,
    classes: Sequence[str],
    examples: Sequence[Example],
    images: Images,
    question: Question,
    seed: int,
    calls: int,
    seconds: float = TIME,
) -> RedTeam:
    """Try the rewards against every class, or a seeded choice of at most `MOST`.

    Args:
        examples: labelled images, for rewards that use the image, and for aliases. The first of each label is used;
            a class without an example gets another's image.
        images: those of the examples.
        question: determines the layout of answers. If it lists the classes, the right one is at another place for each
            label, from the first to the last: naming always the first, or the last, is right for one label.
        calls: the most completions that a user's own function may score. If it is low, fewer classes are tried.
        seconds: after this time no further label is tried.

    Raises:
        UserError: a function cannot be imported.
    """
    names = [name for name, _ in _attacks(classes, question.text, question.template is not None)]
    most = _affordable(len(names), calls) if rewards.has_own else MOST
    chosen = random.Random(f"{seed}/red-team").sample(list(classes), min(most, len(classes)))
    always = [label for label in classes if label in set(chosen)]
    first = {example.label: example for example in reversed(examples)}
    orders = _orders(chosen, classes)
    prompts = [
        Prompt("red-team", first.get(label) or Example(examples[0].image, label), question.listing(order), 0)
        for label, order in zip(chosen, orders, strict=True)
    ]
    constant = list(_constant(always, question.text))
    texts = [
        [text for _, text in (*_attacks(order, prompt.text, question.template is not None), *constant)]
        for prompt, order in zip(prompts, orders, strict=True)
    ]
    score = partial(rewards.score, images=images)
    trials = await _try_all(score, prompts, texts, always, seconds)
    if trials and all(trial.right is None for trial in trials):
        raise UserError(
            f"{_failure(trials[0].answer)} That was a right answer. The same happened with all {len(trials)} "
            f"labels that were tried before training. Fix the function, or raise scoring.time_limit"
        )
    counting = [trial for trial in trials if trial.tells]
    unearned, notes = await _of_the_obedient(score, counting[0], classes) if counting else ("", [])
    names += [name for name, _ in constant]
    scored = [_attack(name, i, list(rewards.weights), counting) for i, name in enumerate(names) if counting]
    return RedTeam(
        sorted(scored, key=lambda attack: -attack.score),
        len(counting),
        1 / len(counting) if counting else 0.0,
        [*_notes(trials, len(chosen), len(classes), seconds), *notes, *rewards.printed()],
        unearned,
    )


def _affordable(besides: int, calls: int) -> int:
    """The most labels that `calls` completions allow, at least 2.

    Each label takes one right answer, `besides` attacks, and one constant answer per label. A few more completions
    follow the question.
    """
    few = 8
    return max(most for most in range(2, MOST + 1) if most * (1 + besides + most) + few <= calls or most == 2)


def render(found: RedTeam) -> str:
    """A table of the worst attacks, with equal constant answers on one line, and the verdict."""
    lines = [f"the rewards against answers that ignore the image, on {found.labels} labels:"]
    if found.attacks:
        heads = "".join(f"{_short(re.split('[:.]', name)[-1], 15):>16}" for name in found.attacks[0].parts)
        lines.append(f"  {'':<{NAME}}{'score':>9}{'chance':>9}{heads}")
        rows: dict[Any, list[Attack]] = {}
        for attack in found.attacks:
            alike = (attack.score, *attack.parts.values()) if attack.name.startswith(ALWAYS) else attack.name
            rows.setdefault(alike, []).append(attack)
        shown = [row for row in rows.values() if row[0].score > 0][:SHOWN]
        lines += [_row(row, found.chance) for row in shown]
        if rest := len(found.attacks) - sum(map(len, shown)):
            lines.append(f"  and {rest} more, which score no more")
        too_much = f"score more than {100 * MARGIN:.0f} % above chance (a right answer has 100 %)"
        lines.append(f"  {len(found.paid)} of {len(found.attacks)} {too_much}")
    return "\n".join([*lines, *(f"  {note}" for note in found.notes)])


def _row(alike: Sequence[Attack], chance: float) -> str:
    first = alike[0]
    more = len(alike) - 1
    others = f" (or any of {more} others)" if more > 1 else " (or the other)" if more else ""
    shares = "".join(f"{f'{100 * share:.1f} %':>9}" for share in (first.score, chance))
    means = "".join(f"{'failed' if mean is None else f'{mean:.2f}':>16}" for mean in first.parts.values())
    return f"  {_short(first.name, NAME - 1 - len(others)) + others:<{NAME}}{shares}{means}"


@dataclass(frozen=True, slots=True)
class _Trial:
    """One label: the reward of its right answer, of each attack, and the total of a (median) wrong answer.

    If the rewards fail on the right answer, `rewards` holds only that failure.
    """

    prompt: Prompt
    answer: Reward
    rewards: list[Reward]
    wrong: float | None

    @property
    def right(self) -> float | None:
        return self.answer.total

    @property
    def tells(self) -> bool:
        """True if a right answer earns more than a wrong one. Only such labels count."""
        return self.right is not None and self.wrong is not None and self.right > self.wrong


def _orders(chosen: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    """For each chosen label the classes, rotated so that the label's place goes from the first to the last."""
    orders = []
    for number, label in enumerate(chosen):
        place = round(number * (len(classes) - 1) / max(1, len(chosen) - 1))
        start = (list(classes).index(label) - place) % len(classes)
        orders.append([*classes[start:], *classes[:start]])
    return orders


def _attacks(classes: Sequence[str], prompt_text: str, listed: bool) -> Iterator[tuple[str, str]]:
    """(name, text) of each attack but the constant answers. `listed`: the prompt lists the classes, in this order."""
    think = _reasoning(prompt_text)
    everything = ", ".join(classes)
    yield "an empty completion", ""
    yield "an empty answer", f"{think}<answer></answer>"
    for letter in ascii_lowercase:
        yield f"the letter {letter}", f"{think}<answer>{letter}</answer>"
    yield "all classes", f"{think}<answer>{everything}</answer>"
    yield "all classes, no tags", everything
    yield "all classes, an answer each", think + "".join(f"<answer>{label}</answer>" for label in classes)
    yield "all classes, in the reasoning", f"<think>{everything}</think><answer></answer>"
    yield "all classes, an open answer", f"{think}<answer>{everything}"
    if listed:
        yield "the first listed, always", f"{think}<answer>{classes[0]}</answer>"
        yield "the last listed, always", f"{think}<answer>{classes[-1]}</answer>"
    yield "the prompt", prompt_text
    for line in [line for line in prompt_text.splitlines() if line.lstrip().startswith(("<think>", "<answer>"))][-1:]:
        yield "the prompt's example line", line


def _constant(always: Sequence[str], prompt_text: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the constant answers: each names one class whatever the image shows."""
    for label in always:
        yield f"{ALWAYS}{printable(label)}", f"{_reasoning(prompt_text)}<answer>{label}</answer>"


def _reasoning(prompt_text: str) -> str:
    return f"<think>{REASONING}</think>" if asks_for_thinking(prompt_text) else ""


async def _try_all(
    score: Score, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], always: Sequence[str], seconds: float
) -> list[_Trial]:
    """Score each prompt's `texts`, until the time is over. The last texts each name one class of `always`."""
    trials: list[_Trial] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for prompt, own_texts in zip(prompts, texts, strict=True):
                own = always.index(prompt.label) - len(always)  # the right answer's place, from the end
                trials.append(await _try(score, prompt, own_texts, own, len(always)))
    return trials


async def _try(score: Score, prompt: Prompt, texts: Sequence[str], own: int, constant: int) -> _Trial:
    """Score all `texts` for one label.

    The last `constant` texts each name one class. `texts[own]` (`own` is negative) is the right answer.
    """
    # Built-in rewards never await anything; this lets the caller's timeout cancel between two labels.
    await asyncio.sleep(0)
    completions = [Completion([], [], text, "stop", 0) for text in texts]
    # Ask about the right answer alone first: a reward that fails on it would fail on all, each up to its time limit.
    (answer,) = await score(prompt, [completions[own]])
    if answer.total is None:
        return _Trial(prompt, answer, [answer], None)
    # Score all at once, so that a batched or async reward works on them together. The right one is scored again.
    rewards = await score(prompt, completions)
    # The median: one class that the reward favours must not define what a wrong answer is worth.
    wrong = [reward.total for reward in rewards[-constant:] if reward is not rewards[own] and reward.total is not None]
    return _Trial(prompt, rewards[own], rewards, statistics.median(wrong) if wrong else None)


async def _of_the_obedient(score: Score, trial: _Trial, classes: Sequence[str]) -> tuple[str, list[str]]:
    """Score completions that follow the question, for a trial's label. Returns why they earn nothing ("" if they do),
    and notes that name rewards which such completions cannot earn."""
    prompt, right = trial.prompt, trial.answer.parts
    other = next(name for name in classes if name != prompt.label)
    texts = [*obedient(prompt.text, prompt.label), *obedient(prompt.text, other)]
    rewards = await score(prompt, [Completion([], [], text, "stop", 0) for text in texts])
    ours, theirs = rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :]
    best = {name: max(reward.parts.get(name, 0.0) for reward in ours) for name in right}
    shows = what_it_shows(prompt.text)
    example = f"{printable(texts[0])} gets {', '.join(f'{name} {value:.2f}' for name, value in best.items())}"
    if not any(
        a.total is not None and b.total is not None and a.total > b.total for a, b in zip(ours, theirs, strict=True)
    ):
        return (
            f"no answer that follows the question can be rewarded: {shows}, and the rewards read the answer "
            f"between <answer> and </answer>. For instance {example}"
        ), []
    lost = [name for name in right if best[name] <= 0 < right[name]]
    return "", [
        f"rewards.{name} cannot be earned by following the question: {shows}. For instance {example}" for name in lost
    ]


def _attack(name: str, index: int, rewards: Sequence[str], trials: Sequence[_Trial]) -> Attack:
    """Aggregate one attack over all labels that count. A failed reward scores 0."""
    scores = []
    for trial in trials:
        total = trial.rewards[index].total
        assert trial.right is not None and trial.wrong is not None
        scores.append(0.0 if total is None else max(0.0, (total - trial.wrong) / (trial.right - trial.wrong)))
    of_part = {
        part: [t.rewards[index].parts[part] for t in trials if part in t.rewards[index].parts] for part in rewards
    }
    parts = {part: statistics.fmean(values) if values else None for part, values in of_part.items()}
    return Attack(name, statistics.fmean(scores), parts)


def _notes(trials: Sequence[_Trial], chosen: int, classes: int, seconds: float) -> list[str]:
    notes = []
    if chosen < classes:
        few = "; scoring.red_team_calls allows no more" if chosen < min(MOST, classes) else ""
        notes.append(f"labels and constant answers: {chosen} of the {classes} classes, chosen by run.seed{few}")
    if len(trials) < chosen:
        notes.append(f"after {seconds:g} s {len(trials)} of {chosen} labels had been tried: the rewards are slow")
    silent = sum(not trial.tells for trial in trials)
    if silent:
        notes.append(f"{silent} labels do not count: the rewards give a right answer no more than a wrong one")
    failed = [reward for trial in trials for reward in trial.rewards if reward.failures]
    if failed:
        tried = sum(len(trial.rewards) for trial in trials)
        notes.append(f"{len(failed)} of {tried} completions are without a reward. {_failure(failed[0])}")
    return notes


def _failure(reward: Reward) -> str:
    name, reason = next(iter(reward.failures.items()))
    return f"rewards.{name} failed: {reason}."


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
