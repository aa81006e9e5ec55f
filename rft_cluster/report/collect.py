"""All that the page of one run shows, from its folder: `context` for the template, `data` for the scripts."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.common.errors import UserError
from rft_cluster.prompts import FOLDER as TEMPLATES
from rft_cluster.prompts import render_template
from rft_cluster.report import evaluations, summary
from rft_cluster.report.calibration import probabilities_of, why_not_calibrated
from rft_cluster.report.charts import curves
from rft_cluster.report.completions import MOST_BYTES, read_columns, steps_that_fit
from rft_cluster.report.hints import hints
from rft_cluster.report.lately import whole
from rft_cluster.run.history import History, card_of
from rft_cluster.run.ledger import Ledger
from rft_cluster.run.parts import FILE as PARTS
from rft_cluster.run.records import read_rows
from rft_cluster.run.saving import BEST, MODEL


@dataclass(frozen=True)
class Page:
    """`context`: values for the template. `data`: JSON values for the scripts, by name."""

    context: dict[str, Any]
    data: dict[str, Any]


def collect(
    history: History, pictures: Mapping[str, bytes], missing: str, ledger: Ledger | None, most_bytes: int = MOST_BYTES
) -> Page:
    """Args:
    pictures: thumbnails, WebP by SHA-256 of the image.
    missing: why some images have none; empty if all have one.
    ledger: None if the run was not checked.
    most_bytes: of `rollouts/`, whose completions are shown.
    """
    problems = list(history.problems)
    manifest = history.manifest or {"name": "", "classes": [], "aliases": {}, "splits": {}, "skipped": {}, "copies": {}}
    classes = list(manifest["classes"])
    images, numbers = _numbered(manifest), {label: number for number, label in enumerate(classes)}
    found = evaluations.answers(history, problems)
    ends = evaluations.ends(found)
    first, last = (ends[0][1] if len(ends) > 1 else [], ends[-1][1] if ends else [])
    steps = steps_that_fit(history, most_bytes=most_bytes)
    reader = AnswerReader(classes, manifest["aliases"])
    columns = read_columns(history, steps, images, numbers, reader)
    if columns.damaged:
        problems.append(f"rollouts/: {columns.damaged} groups are damaged, and left out")
    rollouts = columns.page()
    answered = evaluations.for_page(found, images, numbers)
    context = {
        **_head(history, manifest),
        **_record(history, manifest, problems),
        "ends": [f"{row['split']}, step {row['step']}" for row, _ in ends],
        "difference": summary.difference(first, last),
        "by_class": evaluations.by_class(first, last, classes),
        "has_answers": bool(found),
        "probabilities": probabilities_of(history.folder, problems),
        "not_calibrated": why_not_calibrated(history.folder),
        "ledger": ledger,
        "missing": missing,
        "steps_shown": len(steps),
        "steps_recorded": len(history.recorded),
        "completions_shown": len(rollouts["text"]),
        "problems": problems,
    }
    data = {
        "curves": {**curves(history.steps), "evaluations": whole(history.evaluations)},
        "run": {
            "name": history.name,
            "classes": list(numbers),
            "images": _table(manifest, images),
            "answers": answered,
            "rollouts": rollouts,
        },
        "pictures": {sha256: base64.b64encode(content).decode() for sha256, content in pictures.items()},
    }
    return Page(context, data)


def _head(history: History, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the run is, and what came of it."""
    classes = len(manifest["classes"])
    return {
        "title": history.name,
        "state": history.state,
        "last": history.last,
        "due": history.steps_due,
        "dataset": manifest["name"],
        "classes": classes,
        "model": history.config.get("model", {}).get("path", "unknown model"),
        "accuracies": summary.accuracies(history, classes),
        "verdict": summary.sentence(history),
        "no_features": history.no_features,
        "also": summary.elsewhere(history),
        "hints": hints(history),
    }


def _record(history: History, manifest: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Where the time went, what was survived, and on what it rests."""
    parts = _parts(history.folder, problems)
    return {
        "time": summary.times(history),
        "faults": summary.faults(history),
        "splits": summary.splits(history),
        "skipped": manifest["skipped"],
        "copies": manifest["copies"],
        "manifest_sha256": _sha256(history.folder / "manifest.json"),
        "config": _text(history.folder / "config.yaml"),
        "parts": parts,
        "models": _models(history.folder),
        "question": question(history, parts),
        "drawn": any(part.get("template") for part in parts),
    }


def _numbered(manifest: Mapping[str, Any]) -> dict[str, int]:
    ids = [entry["id"] for entries in manifest["splits"].values() for entry in entries]
    return {name: number for number, name in enumerate(ids)}


def _table(manifest: Mapping[str, Any], images: Mapping[str, int]) -> dict[str, list[str]]:
    """The images in the order of their numbers. Those that no manifest names have no SHA-256, so no picture."""
    entries = {entry["id"]: (entry["sha256"], split) for split, own in manifest["splits"].items() for entry in own}
    known = [entries.get(name, ("", "")) for name in images]
    return {"id": list(images), "sha256": [one[0] for one in known], "split": [one[1] for one in known]}


def question(history: History, parts: Sequence[Mapping[str, Any]]) -> str:
    """What each image was asked: as recorded, else of the exported model, else of a built-in template."""
    if parts and isinstance(parts[-1].get("question"), str):
        return parts[-1]["question"]
    if card := card_of(history.folder, MODEL):
        return card.prompt
    prompt = history.config.get("prompt", {})
    built_in = prompt.get("template") in {path.stem for path in TEMPLATES.glob("*.txt")}
    if built_in and history.manifest:
        try:
            return render_template(prompt["template"], prompt["subject"], history.manifest["classes"])
        except UserError:
            return ""
    return ""


def _parts(run: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        kinds = ("machine", "versions")
        return [row for row in read_rows(run / PARTS) if all(isinstance(row.get(kind), dict) for kind in kinds)]
    except UserError as error:
        problems.append(str(error))
        return []


def _models(run: Path) -> list[dict[str, Any]]:
    cards = {name: card_of(run, name) for name in (MODEL, BEST)}
    return [{"name": name, "steps": card.steps, "validation": card.validation} for name, card in cards.items() if card]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
