"""What stands out in a run, in plain words, each with the number that gave rise to it (pure functions of a `History`).

    for hint in hints(read_history(Path("runs/digits"))):
        print(hint.text, hint.cure)

A hint is a reason to look, not a proof. The thresholds are set so that a healthy run has none; each says its reason.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rft_cluster.classification.baselines import NAMES
from rft_cluster.classification.intervals import wilson
from rft_cluster.common.text import printable
from rft_cluster.report.lately import (
    FEW,
    WINDOW,
    equal_groups,
    evaluations,
    last_answers,
    lately,
    mean,
    rise,
    when,
)
from rft_cluster.run.history import History


@dataclass(frozen=True)
class Hint:
    """`text`: what stands out, with its number. `cure`: what to do. `why`: the threshold and its reason.

    Text of data and models is on one line and without control characters; escape it for a page nevertheless.
    """

    severity: Literal["warning", "note"]
    text: str
    cure: str
    why: str


def hints(history: History) -> list[Hint]:
    """The hints about a run, done or in progress, warnings first."""
    is_sft = history.config.get("algorithm", {}).get("objective") == "sft"
    found = [hint for check in CHECKS if not (is_sft and check in OF_SAMPLING) and (hint := check(history))]
    return sorted(found, key=lambda hint: hint.severity != "warning")


def dead_groups(history: History) -> Hint | None:
    """Groups without an advantage."""
    live = lately(history, "live_groups", FEW)
    # A run that begins by guessing has 40 % such groups, too, and then fewer.
    if live is None or 1 - live <= (0.4 if len(history.steps) >= WINDOW else 0.9):
        return None
    right, wrong = equal_groups(history)
    which = "all right or all wrong" if right and wrong else "all right" if right else "all wrong"
    which = which if right or wrong else "all rewards equal"
    known = f" ({right} all right, {wrong} all wrong)" if right and wrong else ""
    cures = {
        "all right": "There is little left to learn from these images: stop, or add harder ones",
        "all wrong": "Look at rollouts/. If no answer earns anything, ask more easily: prompt.template=closed",
    }
    cure = cures.get(which, "Sample more per image (sampling.group_size), or ask further (schedule.min_live)")
    return Hint(
        "note",
        f"{_percent(1 - live)} of groups teach nothing: {which}{known}, {when(history)}",
        cure,
        f"Above 40 %: two of five images are then generated for nothing (above 90 % before step {WINDOW}).",
    )


def one_answer(history: History) -> Hint | None:
    """An answer that takes the place of others."""
    row, judged = last_answers(history)
    answers = Counter(one.predicted for one in judged if one.predicted is not None)
    if not answers:
        return None
    answer, count = answers.most_common(1)[0]
    own = sum(one.label == answer for one in judged) / len(judged)
    if wilson(count, len(judged))[0] <= min(2 * own, (1 + own) / 2):
        return None
    return Hint(
        "warning",
        f"The policy answers {_quoted(answer)} to {_percent(count / len(judged))} of {row['split']} images, and it is "
        f"the label of {_percent(own)}, after step {row['step']}",
        "Look at these images: the policy may ignore them. Train longer, add shots, or lower optimizer.learning_rate",
        "Above twice the label's share (of two classes: three quarters of the images), beyond the 95 % interval.",
    )


def never_answered(history: History) -> Hint | None:
    """Classes that no image was taken for."""
    row, judged = last_answers(history)
    labels, answers = Counter(one.label for one in judged), {one.predicted for one in judged}
    never = [label for label, images in labels.items() if images >= 5 and label not in answers]
    if not never:
        return None
    names = ", ".join(map(_quoted, never[:5])) + (f" and {len(never) - 5} more" if len(never) > 5 else "")
    taken = Counter(one.predicted for one in judged if one.label in never and one.predicted is not None).most_common(2)
    return Hint(
        "warning",
        f"{names}: never answered, after step {row['step']}, to {sum(labels[label] for label in never)} {row['split']} "
        f"images of {'it' if len(never) == 1 else 'them'}",
        f"Taken for {' and '.join(_quoted(label) for label, _ in taken)}: add shots of these classes, or merge them"
        if taken
        else "Look at the answers: they name no class",
        "With 5 images or more: a policy that knows half of them answers the class in 97 % of such tests.",
    )


def accuracy_fell(history: History) -> Hint | None:
    """Accuracy that was better before."""
    rows = evaluations(history, "validation") or evaluations(history, "test")
    if len(rows) < 2:
        return None
    best, last = max(rows, key=lambda row: row["accuracy_strict"]), rows[-1]
    if last["interval"][1] >= best["interval"][0]:
        return None
    rose = rise(history, "reward", best["step"])
    parts = {key for row in history.steps for key in row if key.startswith("reward/") and key != "reward/accuracy"}
    most = max(parts, key=lambda key: rise(history, key, best["step"]), default="")
    while_rose = rose > 0 and most
    return Hint(
        "warning",
        f"Accuracy fell since step {best['step']}, from {_percent(best['accuracy_strict'])} to "
        f"{_percent(last['accuracy_strict'])} of {last['split']} images"
        + (f", while reward rose by {rose:.2f}: look at {most.removeprefix('reward/')}" if while_rose else ""),
        "The policy earns what does not make it right: lower that reward's weight, or make it harder to earn"
        if while_rose
        else "model-best/ has the better policy. Lower optimizer.learning_rate, or raise algorithm.kl_beta",
        "The 95 % intervals of the best and the last evaluation do not overlap: chance alone gives that in 2 % of runs "
        "with 10 evaluations, in 7 % of those with 50.",
    )


def overfitted(history: History) -> Hint | None:
    """Right on the training images only."""
    split = "validation" if history.unseen else "test"  # which has classes that were not trained
    rows = evaluations(history, split) or evaluations(history, "validation")
    train = lately(history, "reward/accuracy")
    if not rows or rows[-1]["step"] == 0 or train is None or train - rows[-1]["interval"][1] <= 0.1:
        return None
    last = rows[-1]
    return Hint(
        "warning",
        f"{_percent(train)} of the answers to training images are right, but {_percent(last['accuracy_strict'])} of "
        f"those to {last['split']} images",
        "The policy knows its few images by heart: more data.shots before more schedule.steps",
        "10 points above the end of the 95 % interval: sampled answers are right less often than greedy ones.",
    )


def by_chance(history: History) -> Hint | None:
    """Accuracy that guessing gives."""
    rows = evaluations(history, "validation") or evaluations(history, "test")
    classes, due = len((history.manifest or {}).get("classes", ())), history.steps_due
    if not rows or not classes or not due or 2 * rows[-1]["step"] < due or rows[-1]["interval"][0] > 1 / classes:
        return None
    last = rows[-1]
    return Hint(
        "warning",
        f"Accuracy is {_percent(last['accuracy_strict'])} of {last['n']} {last['split']} images after step "
        f"{last['step']}: guessing gives {_percent(1 / classes)}",
        "Look at rollouts/: is any answer right, and does the reward say so? Then more schedule.steps and data.shots",
        "After half of the steps, chance (1 of the classes) is within the 95 % interval.",
    )


def beaten(history: History) -> Hint | None:
    """A baseline that is better."""
    rows = evaluations(history, "test")
    name, best = max(history.baselines.items(), key=lambda item: item[1], default=("", 0.0))
    if history.unseen or not rows or not rows[-1]["step"] or best <= rows[-1]["interval"][1]:
        return None  # with unseen classes the verdict alone compares on the same images
    baseline = NAMES.get(name, printable(name))
    return Hint(
        "warning",
        f"{baseline[:1].upper()}{baseline[1:]} is right on {_percent(best)} of the test images, the trained model on "
        f"{_percent(rows[-1]['accuracy_strict'])}",
        "More data.shots, more schedule.steps, or a model that has seen photographs (configs/photos_1gpu.yaml)",
        "The baseline is above the model's 95 % interval.",
    )


def too_few_images(history: History) -> Hint | None:
    """Evaluations that cannot tell two policies apart."""
    wide = [
        rows[-1]
        for split in ("validation", "test")
        if (rows := evaluations(history, split)) and rows[-1]["interval"][1] - rows[-1]["interval"][0] > 0.2
    ]
    if not wide:
        return None
    row = wide[0]
    return Hint(
        "note",
        f"{row['n']} {row['split']} images are too few to tell: {_percent(row['accuracy_strict'])} may be "
        f"{_percent(row['interval'][0])} to {_percent(row['interval'][1])}",
        f"Raise data.{row['split']}, or use cross-validation (data.folds)",
        "An interval wider than 20 points: policies of one run rarely differ by more.",
    )


def cut_short(history: History) -> Hint | None:
    """Completions that had no room."""
    cut = lately(history, "cut_short", FEW)
    if cut is None or cut <= 0.05:
        return None
    limit = history.config.get("sampling", {}).get("max_tokens")
    return Hint(
        "warning",
        f"{_percent(cut)} of completions were cut at max_tokens{f' ({limit})' if limit else ''}, {when(history)}",
        "Raise sampling.max_tokens: a completion that is cut before its answer earns nothing, whatever it knew",
        "Above 5 %: then a third of all groups of 8 have such a completion, whose advantage is about length.",
    )


def format_lost(history: History) -> Hint | None:
    """A layout that the policy had and lost."""
    now, before = lately(history, "reward/format"), mean(history.steps[:WINDOW], "reward/format")
    if now is None or before is None or before - now <= 0.1:
        return None
    return Hint(
        "warning",
        f"The format fell from {_percent(before)} to {_percent(now)} of completions",
        "The updates are too large: lower optimizer.learning_rate, or raise algorithm.kl_beta, under another run.name",
        f"By more than 10 points over {WINDOW} steps: several times the noise of a step of 160 completions.",
    )


def high_gap(history: History) -> Hint | None:
    """Generators and learners that disagree."""
    gap, stale = lately(history, "logprob_gap"), lately(history, "staleness")
    if gap is None or stale or gap <= 0.05:
        return None
    return Hint(
        "warning",
        f"The log-prob gap is {gap:.3f} nats a token, {when(history)}",
        "Generators and learners compute different models: are the versions those that were tried "
        "(python -m rft_cluster.doctor)? Keep algorithm.importance_cap",
        "Above 0.05, without staleness: rounding gave 0.002 at most in runs of the small model, stale weights 0.17.",
    )


def high_kl(history: History) -> Hint | None:
    """A policy far from its start."""
    kl = lately(history, "kl")
    if kl is None or kl <= 1:
        return None
    return Hint(
        "warning",
        f"The KL from the starting model is {kl:.1f} nats a token, {when(history)}",
        "The policy runs away from what it could do before: raise algorithm.kl_beta, or lower optimizer.learning_rate",
        "Above 1: the tokens are on average e times as likely as before; runs that learn well stay below half of it.",
    )


def entropy_gone(history: History) -> Hint | None:
    """A policy that stopped trying before it was right."""
    now, before = lately(history, "entropy"), mean(history.steps[:WINDOW], "entropy")
    right = lately(history, "reward/accuracy")
    if now is None or not before or len(history.steps) < 2 * WINDOW or now >= 0.1 * before or (right or 0) >= 0.9:
        return None
    return Hint(
        "warning",
        f"The entropy fell from {before:.2g} to {now:.2g} nats a token, and "
        + (
            "the policy does not try other answers" if right is None else f"only {_percent(right)} of answers are right"
        ),
        "Lower optimizer.learning_rate, raise algorithm.kl_beta or sampling.temperature, under another run.name",
        "Below a tenth of its start, with under 90 % right: what is never tried cannot be learned.",
    )


def failed_rewards(history: History) -> Hint | None:
    """Completions that no reward could be computed for."""
    due = history.config.get("schedule", {}).get("prompts_per_step", 0)  # with schedule.min_live a step may have more
    groups = sum(row.get("groups", due) for row in history.steps)
    total = int(history.config.get("sampling", {}).get("group_size", 0)) * groups
    failed = sum(row.get("reward_failures", 0) for row in history.steps)
    if not total or failed <= 0.01 * total:
        return None
    names = Counter[str]()
    for row in history.steps:
        names.update({key.partition("/")[2]: n for key, n in row.items() if key.startswith("reward_failures/")})
    blamed = ", ".join(f"{printable(name)} on {count}" for name, count in names.most_common(3))
    return Hint(
        "warning",
        f"{failed} of {total} completions have no reward: {blamed} failed",
        "rollouts/ has the reasons. If a judge is slow: scoring.time_limit, or score in batches (docs/rewards.md)",
        "Above 1 %: nothing is learned from these, and 10 % in a step end the run (scoring.failure_budget).",
    )


def skipped_updates(history: History) -> Hint | None:
    """Updates whose gradient was not finite."""
    skipped = sum(row.get("skipped") or 0 for row in history.steps)
    if not skipped:
        return None
    return Hint(
        "warning",
        f"{skipped} update{'s were' if skipped > 1 else ' was'} left out: the gradient was infinite or not a number",
        "Lower optimizer.learning_rate. The log names the images in the micro-batches with such a loss",
        "One is enough: in a healthy run none is.",
    )


def idle(history: History) -> Hint | None:
    """Roles that wait for each other."""
    rows = [row for row in history.steps[-WINDOW:] if not row.get("replayed")]
    seconds = {
        stage: sum(row.get(f"seconds/{stage}", 0.0) for row in rows) for stage in ("generate", "learn", "transfer")
    }
    total = sum(seconds.values())
    if len(rows) < WINDOW or not total:
        return None
    shares = {stage: value / total for stage, value in seconds.items()}
    stage = max(shares, key=lambda one: shares[one] / IDLE[one][0])
    limit, who, cure = IDLE[stage]
    if shares[stage] <= limit:
        return None
    return Hint(
        "note",
        f"{_percent(shares[stage])} of the time is {stage}: {who} idle so long",
        cure,
        f"Above {_percent(limit)}, in the last {WINDOW} steps: who waits works in the rest of the time at most.",
    )


IDLE = {
    "generate": (
        0.75,
        "the learners are",
        "More generators.count, or schedule.max_staleness=1. Or a reward of your own is slow (docs/rewards.md)",
    ),
    "learn": (0.75, "the generators are", "More learners.count, or larger learners.micro_batch_tokens"),
    "transfer": (0.25, "all actors are", "Put generators and learners on one host, or see docs/performance.md"),
}
CHECKS: Sequence[Callable[[History], Hint | None]] = (
    *(beaten, by_chance, accuracy_fell, overfitted, one_answer, never_answered, format_lost, skipped_updates),
    *(failed_rewards, high_gap, high_kl, entropy_gone, cut_short, dead_groups, idle, too_few_images),
)
# No faults of SFT: its steps sample nothing, so generators wait, and its entropy falls as targets are learned.
OF_SAMPLING = (entropy_gone, idle)


def _quoted(label: str | None) -> str:
    return f"'{printable(label or '')[:40]}'"


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"
