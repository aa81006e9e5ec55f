"""What a page says in words and tables: before and after, the verdict, where the time went, what was survived."""

import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from rft_cluster.classification.also import change
from rft_cluster.classification.apart import NOTE, apart
from rft_cluster.classification.baselines import ASKED, NAMES, UNTAUGHT, verdict
from rft_cluster.classification.intervals import paired_difference, wilson
from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import UserError
from rft_cluster.report.lately import evaluations
from rft_cluster.run.answers import ALSO, read_answers
from rft_cluster.run.history import History, Row
from rft_cluster.run.inside import keeps_warm_start, read_warm_start, untouched

STAGES = ("generate", "learn", "transfer")
PAUSE = 6 * 3600  # seconds without a line in the log: the run stood still
LAUNCH = re.compile(r"\$ python -m rft_cluster\.launch\b")
WARNINGS_SHOWN = 50


def accuracies(history: History, classes: int) -> list[dict[str, Any]]:
    """The rows of the first figure: each has a name, what it is, a rate and perhaps an interval, 0 to 1.

    Test images if there are any, else validation images.
    """
    rows = []
    for split in ("test", "validation"):
        if found := evaluations(history, split):
            rows += [
                _measured("before" if row is found[0] and row["step"] == 0 else "after", row) for row in _ends(found)
            ]
            if rows[0]["kind"] == "before" and (warm := read_warm_start(history.folder)) and warm.kept:
                said = " to ".join(f"{100 * rate:.1f} %" for rate in warm.validation)
                rows[0] |= {"name": f"After the warm start, {warm.steps} steps of SFT"}
                rows[0]["what"] += f", before GRPO; of the validation images the warm start went from {said}"
            if split == "test":
                rows += [_part(name, own) for name, own in apart(history.tested(history.last), history.unseen).items()]
            break
    rows += [_baseline(name, rate, history.right.get(name, ())) for name, rate in history.baselines.items()]
    if rows and classes:
        rows.append({"kind": "chance", "name": "Chance", "what": f"1 of {classes} classes", "rate": 1 / classes,
                     "interval": None})  # fmt: skip
    return rows


def _baseline(name: str, rate: float, right: Sequence[bool]) -> dict[str, Any]:
    """`right`: on each test image; empty in runs of earlier versions."""
    interval = wilson(sum(right), len(right)) if right else None
    what = "no labelled image seen" if name in UNTAUGHT else "same images"
    if name not in ASKED:
        what = f"no language model, {what}"
    return {"kind": "baseline", "name": NAMES.get(name, name), "what": what, "rate": rate, "interval": interval}


def _ends(rows: Sequence[Row]) -> list[Row]:
    return [rows[0], rows[-1]] if len(rows) > 1 else [rows[0]]


def _measured(kind: str, row: Row) -> dict[str, Any]:
    names = {"before": "Before training", "after": f"After {row['step']} steps"}
    return {
        "kind": kind,
        "name": names[kind],
        "what": f"{row['n']} {row['split']} images",
        "rate": row["accuracy_strict"],
        "interval": row["interval"],
    }


def _part(name: str, own: Row) -> dict[str, Any]:
    """`name`: "seen" or "unseen"."""
    what = f"{own['n']} of the test images, after training"
    return {"kind": "part", "name": f"{name.capitalize()} classes", "what": what, **own}


def difference(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, Any] | None:
    """The paired difference of two evaluations of the same images; None if they are not."""
    first, second = ({one.example_id: one.strict for one in side} for side in (before, after))
    if not first or first.keys() != second.keys():
        return None
    return paired_difference(list(first.values()), [second[name] for name in first])


def sentence(history: History) -> str:
    """The verdict, or why there is none yet."""
    before, after = (history.answered_right(step) for step in (0, history.last))
    if history.right and after and history.manifest:
        images, small = len(history.manifest["splits"]["train"]), history.config.get("model", {}).get("path") == "tiny"
        objective = history.config.get("algorithm", {}).get("objective", "grpo")
        warm = keeps_warm_start(history.folder)
        said = verdict(after, before, history.right, images, small, objective, warm)
        said = said.removeprefix("verdict: ").replace("1-nearest", "1\u2011nearest")  # no line ends there
        note = f" {NOTE.capitalize()}." if history.unseen else ""
        return said[0].upper() + said[1:] + "." + note
    if history.baselines:
        return "Which images the baselines are right on is not recorded, so no verdict image by image can be given."
    return {
        "in progress": "The run is in progress: the test images and the baselines are measured at its end.",
        "stopped": "The run was stopped before its end, so the trained model was not compared with the baselines.",
        "done": "Without test images (data.test), or inside another run, which has the baselines, there is nothing to "
        "compare.",
    }[history.state]


def elsewhere(history: History) -> str:
    """What training did to the answers about another data set, without a stop; empty if none was asked about."""
    try:
        before = read_answers(untouched(history.folder), 0, ALSO)
        after = read_answers(history.folder, history.last, ALSO)
    except UserError:  # damaged
        return ""
    said = change(before, after)
    return said[:1].upper() + said[1:]


def times(history: History) -> dict[str, Any]:
    """Seconds by stage, the rest, and all of them; from the steps' figures and the times in the log."""
    stages = {name: sum(row.get(f"seconds/{name}", 0.0) for row in history.steps) for name in STAGES}
    others = {key.partition("/")[2] for row in history.steps for key in row if key.startswith("seconds/")} - {*STAGES}
    stages |= {name: sum(row.get(f"seconds/{name}", 0.0) for row in history.steps) for name in sorted(others)}
    stages = {name: seconds for name, seconds in stages.items() if seconds}
    at_work, begun, ended = _clock(history.log)
    rest = max(0.0, at_work - sum(stages.values()))
    tokens = sum(row.get("tokens", 0) for row in history.steps)
    return {
        "stages": [{"name": name, "seconds": seconds} for name, seconds in stages.items()]
        + ([{"name": "everything else", "seconds": rest}] if rest else []),
        "all": max(at_work, sum(stages.values())),
        "begun": begun,
        "ended": ended,
        "tokens": tokens,
    }


def _clock(log: Sequence[tuple[str, str]]) -> tuple[float, str, str]:
    """Seconds at work, without the pauses between a run's end and the launch that resumed it; first and last time."""
    if not log:
        return 0.0, "", ""
    moments = [datetime.strptime(time, "%Y-%m-%d %H:%M:%S") for time, _ in log]
    seconds = 0.0
    for (before, after), (_, text) in zip(pairwise(moments), log[1:], strict=True):
        apart = (after - before).total_seconds()
        if 0 < apart < PAUSE and not LAUNCH.match(text):
            seconds += apart
    return seconds, log[0][0], log[-1][0]


def faults(history: History) -> dict[str, Any]:
    """What the run survived, and what it warned of."""
    warnings = [{"time": time, "text": text} for time, text in history.log if text.startswith("WARNING: ")]
    launches = sum(1 for _, text in history.log if LAUNCH.match(text))
    again = Counter(history.redone)
    return {
        "losses": [{"time": one.time, "error": one.error, "cure": one.cure} for one in history.losses],
        "resumed": max(0, launches - 1),
        "redone": len(again),
        "redone_span": f"{min(again)} to {max(again)}" if again else "",
        "warnings": warnings[-WARNINGS_SHOWN:],
        "more_warnings": max(0, len(warnings) - WARNINGS_SHOWN),
        "masked": sum(row.get("reward_failures", 0) for row in history.steps),
        "skipped": sum(row.get("skipped") or 0 for row in history.steps),
    }


def splits(history: History) -> list[dict[str, Any]]:
    """The number of images by split, and the fewest and most of a class."""
    rows = []
    for name, entries in (history.manifest or {}).get("splits", {}).items():
        counts = Counter(entry["label"] for entry in entries)
        if entries:
            rows.append({"name": name, "images": len(entries), "classes": len(counts), "least": min(counts.values()),
                         "most": max(counts.values())})  # fmt: skip
    return rows
