"""What a run's folder tells, read for people: the run may be in progress, stopped, of an older version, or a copy.

    history = read_history(Path("runs/digits"))
    history.steps[-1]["reward"]             # a row of metrics.jsonl; docs/metrics.md has its keys
    history.rollouts(history.steps[-1]["step"])

Nothing is written, no function of the user's is run, and no text of a record is followed as a path. What is missing is
empty here, and what cannot be read is said in `problems`: `ledger.py` is the one that proves.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rft_cluster.classification.apart import parted
from rft_cluster.classification.baselines import SKIPPED, Flags, recorded_flags
from rft_cluster.classification.card import Card
from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import json_object
from rft_cluster.common.lookup import near_path, nearest
from rft_cluster.common.text import shown
from rft_cluster.data.manifest import read_manifest, unseen_in
from rft_cluster.run.answers import read_answers
from rft_cluster.run.journal import step_files
from rft_cluster.run.lock import holder
from rft_cluster.run.proof.kept import read_lines
from rft_cluster.run.records import ROWS
from rft_cluster.run.resume import check_kinds, is_run, read_saved_config
from rft_cluster.run.saving import BASELINES_FILE, MODEL, exported, read_baselines

Row = dict[str, Any]
# A line of log.txt: its time, two spaces, its text. After a loss two of them say what was lost, and what was done.
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (.*)")
WARNING = "WARNING: "
HEALED = re.compile(r"starts? (afresh|once more)|goes on without it")
HEALED_WITHIN = 5  # lines: the text of an error may have several
LARGEST = 1e50  # of a figure, and no step is as large as a billion: a damaged record may have 400 digits
STEPS = range(10**9)


@dataclass(frozen=True)
class Loss:
    """A loss that the run survived, e.g. `Loss("2026-11-26 19:19:36", "generator died ...", "generator starts afresh
    (1 of 3 times without a new step)")`."""

    time: str
    error: str
    cure: str


@dataclass(frozen=True)
class History:
    """A run's records, all but its completions in memory.

    `config`: the configuration by section and key, as JSON values; empty if this version cannot read it.
    `steps`, `evaluations`: the rows of `metrics.jsonl` and `eval.jsonl`, in order. Their figures are numbers.
    `baselines`: test accuracies, 0 to 1, by name; empty before the run's end.
    `right`: by the same names, whether they are right on each test image of a seen class; empty in older versions.
    `no_features`: why there are no baselines on vision features; empty if there are.
    `manifest`: see `data.manifest.read_manifest`; None if there is none that can be read.
    `redone`: the steps that were done again.
    `problems`: what could not be read, a sentence each.
    """

    folder: Path
    config: dict[str, Any]
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    baselines: dict[str, float]
    right: dict[str, Flags]
    no_features: str
    manifest: dict[str, Any] | None
    state: Literal["in progress", "stopped", "done"]
    redone: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def last(self) -> int:
        """The last recorded step; 0 before the first."""
        return max((row["step"] for row in self.steps), default=0)

    @property
    def steps_due(self) -> int | None:
        """`schedule.steps`; None without a configuration that can be read."""
        return self.config["schedule"]["steps"] if self.config else None

    @property
    def recorded(self) -> tuple[int, ...]:
        """The steps whose completions are in `rollouts/`, ascending. The last may be ahead of `steps`."""
        return tuple(step_files(self.folder / "rollouts"))

    def rollouts(self, step: int) -> list[Row]:
        """The groups of a step, from 1, in order: rows of `rollouts/`. Empty without a file; damaged rows are left out.

        Older versions wrote fewer keys (see `rollouts.py`).
        """
        rows = _objects(self.folder / "rollouts" / f"step-{step:06d}.jsonl")
        return [row for row in rows if isinstance(row.get("completions"), list)]

    @property
    def unseen(self) -> tuple[str, ...]:
        """The classes that are tested and not trained."""
        return unseen_in(self.manifest) if self.manifest else ()

    def answered_right(self, step: int) -> list[bool]:
        """Whether each test image of a seen class was answered right after `step`; empty without all answers."""
        return parted(self.tested(step), self.unseen)["seen"]

    def tested(self, step: int) -> list[Judged]:
        """The answers to the test images of the manifest after `step`; empty without all of them."""
        try:
            judged = read_answers(self.folder, step, "test")
        except UserError:
            return []
        tested = self.manifest["splits"]["test"] if self.manifest else []
        return judged if [one.example_id for one in judged] == [entry["id"] for entry in tested] else []

    @cached_property
    def log(self) -> tuple[tuple[str, str], ...]:
        """(time, text) of each line of `log.txt`. The text may have anything that a terminal may be sent."""
        file = self.folder / "log.txt"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return tuple(found for line in text.split("\n") if (found := _line(line)))

    @cached_property
    def losses(self) -> tuple[Loss, ...]:
        """The losses that the run survived, in order."""
        return tuple(_losses(self.log))


def read_history(run: Path) -> History:
    """Read the folder of a run.

    Raises:
        UserError: it is not the folder of a run; the nearest one is named. Or there is a link or a pipe in place of a
            file.
    """
    check_is_run(run)
    check_kinds(run)
    problems: list[str] = []
    rows = {}
    for name in ROWS:
        found, damaged, _ = read_lines(run / name)
        rows[name] = [row for row in found if row["step"] in STEPS]
        problems += damaged
    config, manifest = _config(run, problems), _manifest(run / "manifest.json", problems)
    record = read_baselines(run)
    steps = tuple({key: value for key, value in row.items() if _is_number(value)} for row in rows["metrics.jsonl"])
    return History(
        folder=run,
        config=config,
        steps=steps,
        evaluations=tuple(filter(_is_evaluation, rows["eval.jsonl"])),
        baselines={name: value for name, value in record.items() if isinstance(value, float)},
        right=recorded_flags(record, _seen_images(manifest) if manifest else 0),
        no_features=str(record.get(SKIPPED, "")),
        manifest=manifest,
        state=_state(run, config, steps),
        redone=tuple(_redone(run)),
        problems=tuple(problems),
    )


def check_is_run(folder: Path, where: str = "") -> None:
    """Raise UserError if a folder is not that of a run; the message begins with `where`, and names the nearest."""
    if is_run(folder):
        return
    if not folder.exists():
        raise UserError(f"{where}there is no folder {shown(str(folder))}{near_path(folder)}")
    inside = sorted(path.name for path in (folder.iterdir() if folder.is_dir() else ()) if is_run(path))
    beside = sorted(path.name for path in folder.parent.iterdir() if is_run(path))
    near = nearest(folder.name, beside)
    hint = f". It holds runs: {shown(', '.join(inside[:10]))}" if inside else ""
    hint = hint or (f". Did you mean {shown(str(folder.parent / near))}?" if near else "")
    raise UserError(f"{where}{shown(str(folder))} is not the folder of a run{hint}")


def _line(line: str) -> tuple[str, str] | None:
    """Time and text of a line of `log.txt`; None if it has no time, or one that is in no calendar."""
    found = LOG_LINE.fullmatch(line)
    try:
        return (found[1], found[2]) if found and datetime.fromisoformat(found[1]) else None
    except ValueError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST  # which nothing that is not a number is


def _is_evaluation(row: Row) -> bool:
    """Older versions recorded fewer figures, and before that no split."""
    figures = [value for key, value in row.items() if key not in ("split", "interval")]
    ends = row.get("interval", [0, 0])
    pair = isinstance(ends, list) and len(ends) == 2
    return isinstance(row.get("split"), str) and pair and all(map(_is_number, [*figures, *ends]))


def _config(run: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_saved_config(run / "config.yaml").model_dump(mode="json")
    except UserError as error:
        problems.append(shown(str(error).partition("\n")[0]))
        return {}


def _manifest(file: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        return read_manifest(file)
    except UserError as error:
        problems.append(shown(str(error).removeprefix("data.manifest: ").partition("\n")[0]))
        return None


def _seen_images(manifest: dict[str, Any]) -> int:
    """The number of test images of classes that are trained."""
    unseen = unseen_in(manifest)
    return sum(entry["label"] not in unseen for entry in manifest["splits"]["test"])


def _state(run: Path, config: dict[str, Any], steps: tuple[Row, ...]) -> Literal["in progress", "stopped", "done"]:
    """Of a run that still writes its last report, too: done."""
    card = card_of(run, MODEL)
    last = max((row["step"] for row in steps), default=0)
    if config and card and card.steps == config["schedule"]["steps"] == last and _is_compared(run, config):
        return "done"
    return "in progress" if holder(run) else "stopped"


def _is_compared(run: Path, config: dict[str, Any]) -> bool:
    return not config["data"]["test"] or (run / BASELINES_FILE).is_file()


def card_of(run: Path, model: str) -> Card | None:
    """The card of an exported model; None without one, or if it is damaged: the ledger says more."""
    try:
        return exported(run / model)
    except UserError:
        return None


def _redone(run: Path) -> Iterator[int]:
    for folder in sorted(run.glob("redone-*")):
        yield from sorted(row["step"] for row in read_lines(folder / "metrics.jsonl")[0])


def _losses(log: tuple[tuple[str, str], ...]) -> Iterator[Loss]:
    for number, (time, text) in enumerate(log):
        if text.startswith(WARNING):
            after = [line for _, line in log[number + 1 : number + 1 + HEALED_WITHIN]]
            until = next((i for i, line in enumerate(after) if line.startswith(WARNING)), len(after))
            if cure := next((line for line in after[:until] if HEALED.search(line)), None):
                yield Loss(time, text.removeprefix(WARNING), cure)


def _objects(file: Path) -> Iterator[Row]:
    lines = file.read_bytes().split(b"\n") if file.is_file() and not file.is_symlink() else []
    return (row for line in lines if line and (row := json_object(line)) is not None)
