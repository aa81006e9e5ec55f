"""Decide whether a run may start or resume, and from which step."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft_cluster.common import stopping
from rft_cluster.common.errors import PASSING, ClusterError, Unavailable, UserError, explain
from rft_cluster.common.files import FULL, DiskFull, NewerFormat
from rft_cluster.common.lookup import nearest
from rft_cluster.common.text import shown
from rft_cluster.config import Config, Section
from rft_cluster.config.load import read_file, validated
from rft_cluster.data.manifest import OtherData, read_manifest
from rft_cluster.run.activity import ACTIVITY_FILE
from rft_cluster.run.checkpoints import Checkpoint, latest_checkpoint, newest_step
from rft_cluster.run.folder import ALSO_MANIFEST, CONFIG_END
from rft_cluster.run.lock import LOCK_FILE
from rft_cluster.run.options import OPTIONS_FILE
from rft_cluster.run.records import ROWS, read_rows
from rft_cluster.run.task import Task, family_of_model, prepare_run

SFT_RATE = "optimizer.sft_learning_rate"
# These keys do not change what a step computes, so they may differ when a run is resumed. The data may have moved: the
# manifests have the hash of each image.
MAY_CHANGE = {
    *("cluster", "generators", "learners", "scoring", "debug", "run.name", "run.folder", "run.sinks", "tracking"),
    *("baselines", "evaluation.encoder", SFT_RATE),
    *(
        f"{data}.{key}"
        for data in ("data", "evaluation.also")
        for key in ("path", "images", "held_out", "download", "manifest")
    ),
    *(f"schedule.{key}" for key in ("steps", "evaluate_every", "save_every", "save_minutes", "keep_checkpoints")),
    "schedule.stop_when_stuck",
}
# A folder with any of these is the folder of a run. (Evaluations of the untouched model may be there before.)
RECORDS = ("config.yaml", "metrics.jsonl", "eval.jsonl", "checkpoints", "model")
IMAGE_LIMITS = {f"model.{edge}_{unit}" for edge in ("min", "max") for unit in ("image_tokens", "pixels")}
FOLDERS = (
    *("checkpoints", "model", "model-best", "rollouts", "evaluations", "journal", "tensorboard", "wandb"),
    *("baselines", "warm_start"),
)
RECORD_FILES = ("config.yaml", "manifest.json", "metrics.jsonl", "eval.jsonl", "parts.jsonl")
FILES = (*RECORD_FILES, ALSO_MANIFEST, OPTIONS_FILE, "log.txt", ACTIVITY_FILE, LOCK_FILE)


@dataclass(frozen=True)
class Start:
    """The point from which a run starts."""

    checkpoint: Checkpoint | None = None
    manifest: Path | None = None
    """The run's own manifest, if it is resumed."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""

    @property
    def step(self) -> int:
        return self.checkpoint.state.step if self.checkpoint else 0

    def own_images(self, config: Config) -> Config:
        """The configuration for reading the data. A resumed run reads its own images only, by its manifest."""
        if self.manifest is None:
            return config
        update: dict[str, Any] = {"data": config.data.model_copy(update={"manifest": self.manifest})}
        also, manifest = config.evaluation.also, self.manifest.with_name(ALSO_MANIFEST)
        if also and manifest.is_file():
            own = also.model_copy(update={"manifest": manifest})
            update["evaluation"] = config.evaluation.model_copy(update={"also": own})
        return config.model_copy(update=update)


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RECORDS)


def check_begun(config: Config) -> None:
    """Check that there is a run to resume: a misspelt name would begin another.

    Raises:
        UserError: there is none.
    """
    folder = config.run_folder
    if is_run(folder):
        return
    others = [path.name for path in folder.parent.glob("*") if is_run(path)]
    near = nearest(folder.name, others)
    hint = f"did you mean run.name={shlex.quote(near)}? " if near else ""
    raise UserError(
        f"--resume: there is no run in {folder}: {hint}Leave --resume out to begin it; --resume=auto does either"
    )


def find_start(config: Config, resume: bool) -> Start:
    """Find the start of a run. Reads only the run's folder, and writes nothing.

    Raises:
        UserError: the folder has a run and `resume` is false, a run with another configuration, or damaged records.
    """
    folder = config.run_folder
    if not is_run(folder):
        return Start()
    if not resume:
        raise UserError(f"{folder} exists: add --resume to resume that run, or choose another run.name")
    notes = []
    saved_file = folder / "config.yaml"
    if saved_file.is_file():
        saved = read_saved_config(saved_file)
        _check_unchanged(folder, saved, config)
        notes += _changed_schedule(saved, config)
    for name in ROWS:
        read_rows(folder / name)  # raises if a line is damaged
    checkpoint, problems = latest_checkpoint(folder)
    instead = "took the one before" if checkpoint else "all steps are in the journal"
    notes += [f"WARNING: passed over a damaged checkpoint, and {instead}: {problem}" for problem in problems]
    steps, done = config.schedule.steps, checkpoint.state.step if checkpoint else 0
    if done > steps:
        raise UserError(
            f"{folder} has done {done} steps, and schedule.steps is {steps}: set schedule.steps={done} or more, or "
            f"choose another run.name"
        )
    where = f"after step {done} of {steps}, from {checkpoint.path}" if checkpoint else "with step 1: none was saved"
    manifest = folder / "manifest.json"
    if manifest.is_file():
        _check_readable(manifest)
        return Start(checkpoint, manifest, (*notes, f"{folder} goes on {where}"))
    return Start(checkpoint, None, (*notes, f"{folder} goes on {where}"))


def read_task(start: Start, config: Config) -> Task:
    """Read the task of a run. A resumed run must have the same images and question as before.

    Raises:
        UserError: the data or the template are unusable, or differ from those that the run started with.
    """
    try:
        own = start.own_images(config)
        task = prepare_run(own)
    except OtherData as error:
        if start.manifest is None:
            raise
        raise UserError(
            f"{config.run_folder} resumes with the images it was started with, but some are gone or have changed. "
            f"Bring them back, or choose another run.name:\n{error.problems}"
        ) from error
    if start.checkpoint and start.checkpoint.state.prompt_sha256 != task.question.sha256:
        raise UserError(
            f"{config.run_folder} was started with another prompt: the template's text has changed since, or the run "
            f"began before classes were listed in drawn orders"
        )
    return task


def read_saved_config(file: Path) -> Config:
    """Read the configuration in a run's folder.

    Raises:
        UserError: the file is damaged, or a newer version of the program wrote it.
    """
    try:
        values = read_file(file)
        if file.read_bytes().startswith(b"format:") and not file.read_bytes().endswith(CONFIG_END.encode()):
            # A truncated file could be read as a different, valid configuration.
            raise UserError(f"{file}: its end is missing")
        if not file.read_bytes().startswith(b"format:") and isinstance(values.get("data"), dict):
            # Versions without a format number wrote these two keys even if the user had not set them.
            former = {"image_column": "image", "label_column": "label"}
            values["data"] = {key: value for key, value in values["data"].items() if former.get(key) != value}
        return validated(Config, values, f"{file} is not what a run leaves")
    except NewerFormat:
        raise
    except UserError as error:
        raise UserError(
            f"{error}\n{file} is damaged: bring it back, or remove it to go on with the configuration given here"
        ) from error


def _check_readable(manifest: Path) -> None:
    try:
        read_manifest(manifest)
    except UserError as error:
        text = str(error).removeprefix("data.manifest: ")
        raise UserError(f"{text}\nBring it back, or remove it to draw the images anew, as run.seed says") from error


def check_kinds(folder: Path) -> None:
    """Raise UserError for a file in place of a folder, a folder in place of a file, or a link in place of a file.

    In a stranger's folder a link may lead to any file, which would be overwritten.
    """
    places = [*reversed(folder.parents), folder, *(folder / name for name in FOLDERS)]
    for place in places:
        if os.path.lexists(place) and not place.is_dir():
            what = "a link to nothing" if place.is_symlink() and not place.exists() else "not a folder"
            raise UserError(f"{place} is {what}: remove or rename it, or choose another run.folder or run.name")
    for file in (folder / name for name in FILES):
        if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
            what = "a link" if file.is_symlink() else "a folder" if file.is_dir() else "a pipe or device"
            raise UserError(f"{file} is {what}, not a file: remove or rename it, or choose another run.name")


def _check_unchanged(folder: Path, saved: Config, config: Config) -> None:
    then, now = _flat(saved, config), _flat(config, saved)
    changed = [key for key in (then | now) if not _may_change(key, saved) and then.get(key) != now.get(key)]
    if IMAGE_LIMITS.intersection(changed):  # one may say in pixels what the other says in tokens
        side = family_of_model(config).side
        if saved.model.pixels(side) == config.model.pixels(side):
            changed = [key for key in changed if key not in IMAGE_LIMITS]
    if changed:
        lines = "\n".join(f"  {_explain(key, then, now)}" for key in changed)
        raise UserError(
            f"{folder} was started with another configuration. Choose another run.name, or set back what "
            f"changed:\n{lines}"
        )


def _flat(section: Section, other: Section, above: str = "") -> dict[str, Any]:
    """`section.key` -> value; `section.section.key` where `other`, too, has the section within. One that `other` has
    not is a single value, without the keys that have their defaults."""
    found: dict[str, Any] = {}
    for name, value in section.model_dump(mode="json").items():
        key, own, theirs = f"{above}{name}", getattr(section, name), getattr(other, name)
        if isinstance(own, Section) and isinstance(theirs, Section):
            found |= _flat(own, theirs, f"{key}.")
        elif isinstance(own, Section):
            found[key] = own.model_dump(mode="json", exclude_defaults=True)
        elif isinstance(own, dict) and not above:  # `rewards`
            found |= {f"{key}.{one}": weight for one, weight in value.items()}
        else:
            found[key] = value
    return found


def _may_change(key: str, saved: Config) -> bool:
    if key == SFT_RATE and saved.schedule.warm_start:
        return False  # GRPO starts from what was, or is being, learned at that rate
    return key in MAY_CHANGE or key.partition(".")[0] in MAY_CHANGE


def _explain(key: str, then: dict[str, Any], now: dict[str, Any]) -> str:
    if key not in then:
        return f"{key} is {_typed(now[key])} and was not set: leave it out"
    is_now = f"is {_typed(now[key])}" if key in now else "is not set"
    cure = shlex.quote(f"{key}={_typed(then[key])}")
    if isinstance(then[key], dict) and isinstance(now.get(key), dict) and (more := now[key].keys() - then[key].keys()):
        cure = f"leave {', '.join(map(shown, sorted(more)))} out"  # an override can only add to a mapping
    return f"{key} was {_typed(then[key])} and {is_now}: {cure}"


def _typed(value: Any) -> str:
    """The value as typed in an override."""
    return shown(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _changed_schedule(saved: Config, config: Config) -> list[str]:
    then, now = saved.schedule.steps, config.schedule.steps
    if then == now:
        return []
    return [
        f"schedule.steps was {then} and is {now}: from here on the learning rate falls linearly to 0 at step {now}, no "
        f"longer at step {then}"
    ]


def resume_line(folder: Path, command: list[str]) -> str:
    """For a run that ended early: the last saved step, and the command to resume."""
    asked = any(word.startswith("--resume") for word in command)
    again = shlex.join(command if asked else [*command, "--resume" if is_run(folder) else "--resume=auto"])
    step = newest_step(folder)
    saved = "no step was saved yet" if step is None else f"step {step} is saved"
    return f"{saved}; go on with: {again}"


def raise_with_cure(error: BaseException, folder: Path, command: list[str]) -> None:
    """Add `resume_line` to an error after which the run may go on.

    Raises:
        KeyboardInterrupt: after a signal, of which `error` is a consequence.
        ClusterError: after the loss of an actor, or of weights on their way.
        DiskFull: after a write for which a run that has begun had no room.
        Unavailable: where a server, of a network disk too, did not answer to a run that has begun.
    """
    if stopping.received():
        raise KeyboardInterrupt(f"interrupted: {resume_line(folder, command)}") from error
    if isinstance(error, ClusterError):
        raise ClusterError(f"{error}\n{resume_line(folder, command)}") from error
    if isinstance(error, DiskFull | Unavailable) and is_run(folder):
        raise type(error)(f"{error}\n{resume_line(folder, command)}") from error
    if isinstance(error, OSError) and error.errno in {*FULL, *PASSING} and is_run(folder):
        kind = DiskFull if error.errno in FULL else Unavailable
        raise kind(f"{explain(error)}\n{resume_line(folder, command)}") from error
