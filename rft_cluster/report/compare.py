"""Runs side by side: accuracies, the paired interval of each difference, curves, and the settings that differ."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rft_cluster.classification.apart import apart
from rft_cluster.classification.intervals import paired_difference
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import check_writable, write_text
from rft_cluster.common.text import shown
from rft_cluster.report.charts import CHARTS, DIGITS, MOST_POINTS
from rft_cluster.report.collect import Page
from rft_cluster.report.hints import hints
from rft_cluster.report.page import render
from rft_cluster.report.summary import times
from rft_cluster.run.answers import read_answers
from rft_cluster.run.figures import rounded, thinned
from rft_cluster.run.history import History, Row, read_history
from rft_cluster.run.resume import is_run

SCRIPTS = ("charts.js", "compare.js")
MOST_PAIRED = 6  # runs of which each two are compared; of more, each with the first
MOST_CURVES = 5  # runs: as many colours can be told apart
NOT_SETTINGS = ("run.name", "run.folder")


@dataclass(frozen=True)
class Side:
    """One of the runs. `final`: the last evaluation of its trained policy, on test images if there is one; else of
    the untrained one; else {}.

    `right`: whether the answer to each image of it is right, by (SHA-256 of the image, label).
    """

    name: str
    history: History
    final: Row
    right: dict[tuple[str, str], bool]


def write_comparison(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page, into the folder that holds all runs if no file is named. Returns the file.

    A folder of runs, as of a sweep or of folds, stands for the runs in it.

    Raises:
        UserError: fewer than two runs, one of them twice, or one that is none; or the file cannot be written.
    """
    runs = [run for folder in runs for run in _runs_in(folder)]
    if len(runs) < 2 or len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"--compare needs two runs or more, each once: {shown(', '.join(map(str, runs)))}")
    histories = [read_history(run) for run in runs]
    parents = [str(run.absolute().parent) for run in runs]
    file = output or Path(os.path.relpath(os.path.commonpath(parents))) / "compare.html"
    check_writable(file.parent, "Set --output to a file in a folder that can be")
    page = compare(histories)
    write_text(file, render("compare.html", page.context, page.data, SCRIPTS))
    return file


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run, or has none in it."""
    inside = [] if is_run(folder) or not folder.is_dir() else sorted(path for path in folder.iterdir() if is_run(path))
    return inside or [folder]


def compare(histories: Sequence[History]) -> Page:
    """The content of the page."""
    sides = [_side(history, name) for history, name in zip(histories, _names(histories), strict=True)]
    context = {
        "title": f"{len(sides)} runs",
        "accuracies": [row for side in sides if side.final for row in _accuracies(side)],
        "rows": [_row(side) for side in sides],
        "differences": list(_differences(sides)),
        "each_pair": len(sides) <= MOST_PAIRED,
        "settings": _settings(sides),
        "curves_of": min(len(sides), MOST_CURVES),
    }
    return Page(context, {"curves": _curves(sides[:MOST_CURVES])})


def _names(histories: Sequence[History]) -> list[str]:
    """The names of the runs; for those of the same name, their paths."""
    twice = {name for name, count in Counter(history.name for history in histories).items() if count > 1}
    return [str(history.folder) if history.name in twice else history.name for history in histories]


def _side(history: History, name: str) -> Side:
    measured = [row for row in history.evaluations if "accuracy_strict" in row]
    final = max(measured, key=lambda row: (row["step"] > 0, row["split"] == "test", row["step"]), default={})
    return Side(name, history, final, _right(history, final))


def _right(history: History, final: Row) -> dict[tuple[str, str], bool]:
    """Empty if no answers are recorded, or they are damaged."""
    if not final or not history.manifest:
        return {}
    sha256 = {entry["id"]: entry["sha256"] for entry in history.manifest["splits"].get(final["split"], [])}
    try:
        judged = read_answers(history.folder, final["step"], final["split"])
    except UserError:
        return {}
    return {(sha256[one.example_id], one.label): one.strict for one in judged if one.example_id in sha256}


def _accuracies(side: Side) -> list[dict[str, Any]]:
    """The run's accuracy, and those on seen and unseen classes, if there are any of these."""
    row = side.final
    whole = {
        "kind": "compared",
        "name": side.name,
        "what": f"{row.get('n', '?')} {row['split']} images, after {row['step']} steps",
        "rate": row["accuracy_strict"],
        "interval": row.get("interval"),
    }
    if row["split"] != "test":
        return [whole]
    found = apart(side.history.tested(row["step"]), side.history.unseen)
    shares = [
        {"kind": "part", "name": f"{side.name}, {name} classes", "what": f"{own['n']} of these images", **own}
        for name, own in found.items()
    ]
    return [whole, *shares]


def _row(side: Side) -> dict[str, Any]:
    history = side.history
    before = [row for row in history.evaluations if row["split"] == side.final.get("split") and row["step"] == 0]
    return {
        "name": side.name,
        "state": history.state,
        "steps": history.last,
        "due": history.steps_due,
        "before": before[0].get("accuracy_strict") if before else None,
        "after": side.final.get("accuracy_strict") if side.final.get("step") else None,
        "format": side.final.get("format_rate"),
        "baseline": max(history.baselines.values(), default=None),
        "of_seen": bool(history.unseen),  # no baseline can know the others
        "seconds": times(history)["all"],
        "hints": [hint.text for hint in hints(history)],
    }


def _differences(sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
    pairs = combinations(sides, 2) if len(sides) <= MOST_PAIRED else ((sides[0], other) for other in sides[1:])
    for first, second in pairs:
        yield {"first": first.name, "second": second.name, **difference(first, second)}


def difference(first: Side, second: Side) -> dict[str, Any]:
    """The paired difference on the images that both were tested on (see `paired_difference`), or `problem`: why not."""
    without = [side.name for side in (first, second) if not side.right]
    if without:
        return {"problem": f"no answers to compare are recorded of {' and '.join(without)}"}
    if first.final["split"] != second.final["split"]:
        return {"problem": f"one has {first.final['split']} images, the other {second.final['split']} images"}
    both = first.right.keys() & second.right.keys()
    if not both:
        return {"problem": "no image is in both, with the same label"}
    ordered = sorted(both)
    found = paired_difference([first.right[one] for one in ordered], [second.right[one] for one in ordered])
    return {**found, "problem": "", "images": [len(first.right), len(second.right)]}


def _settings(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The keys of the configuration that differ, each with a text for each run."""
    flat = [dict(_flat(side.history.config)) for side in sides]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in NOT_SETTINGS]
    rows = [{"key": key, "values": [one.get(key, "") for one in flat]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _flat(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """`section.key` and the value as JSON; text as it is."""
    for section, values in config.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{section}.{key}" if key else section, text


def _curves(sides: Sequence[Side]) -> dict[str, Any]:
    """As `charts.curves`, with a series for each run; accuracy first, in percent."""
    rows = [thinned(side.history.steps, MOST_POINTS) for side in sides]
    measured = [[row for row in side.history.evaluations if "accuracy_strict" in row] for side in sides]
    steps = sorted({row["step"] for own in (*rows, *measured) for row in own})
    charts = []
    for split in ("validation", "test"):
        percent = [
            {row["step"]: 100 * row["accuracy_strict"] for row in own if row["split"] == split} for own in measured
        ]
        if any(len(own) > 2 for own in percent):  # two measurements, before and after, are no curve
            charts.append(_chart(sides, steps, percent, f"Accuracy, {split}", "%", "Strict.", points=True))
    for chart in CHARTS:
        key = chart.keys[0]
        own = [
            {row["step"]: value for row in one if (value := rounded(row.get(key), DIGITS)) is not None} for one in rows
        ]
        if any(value for values in own for value in values.values()):
            charts.append(_chart(sides, steps, own, chart.title, chart.unit, chart.reading, points=False))
    return {"step": steps, "charts": charts}


def _chart(
    sides: Sequence[Side],
    steps: Sequence[int],
    values: Sequence[dict[int, float]],
    title: str,
    unit: str,
    reading: str,
    *,
    points: bool,
) -> dict[str, Any]:
    series = [{"name": side.name, "values": [own.get(step) for step in steps], "points": points}
              for side, own in zip(sides, values, strict=True)]  # fmt: skip
    return {"title": title, "unit": unit, "reading": reading, "series": series}
