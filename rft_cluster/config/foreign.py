"""Treat a `config.yaml` in a run's folder as data, perhaps a stranger's. Values that run code, open connections or read
other files are refused unless the command line repeats them.

Paths in `HONOURED` are accepted: they lead to safetensors and images, and the run is useless without them. `run.folder`
and `run.name` are ignored: the run is in the folder where its config.yaml is. `data.download` is accepted: it fetches
one archive, from a fixed address and with known MD5s.
"""

import os
import re
import shlex
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.config.data import DataSection
from rft_cluster.config.sections import Config

D = TypeVar("D", bound=DataSection)
TEMPLATES = {path.stem for path in (Path(__file__).parents[1] / "prompts").glob("*.txt")} | {"problem"}
RECORDS = ("manifest.json", "metrics.jsonl", "eval.jsonl", "rollouts", "checkpoints")
EXPORTS = ("classifier.json", "model/classifier.json", "model-best/classifier.json")


def _is_own_code(name: str) -> bool:
    """Return True for the dotted path of a function, as opposed to a built-in name."""
    return re.search("[.:]", name) is not None


def _is_given(value: Any) -> bool:
    return value is not None


# key: (does this value need confirmation?, what it does, the value that does without)
CAUTIONS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "run.sinks": (bool, "runs functions that are not built in", "[]"),
    "model.trust_remote_code": (bool, "runs code of the model's folder", "false"),
    **{
        f"{data}.{key}": caution
        for data in ("data", "evaluation.also")
        for key, caution in {
            "source": (_is_own_code, "runs a function that is not built in", "folder"),
            "held_out": (_is_given, "reads files elsewhere", "null"),
            "manifest": (_is_given, "reads a file elsewhere", "null"),
        }.items()
    },
    **{
        f"algorithm.{key}": (_is_own_code, "runs a function that is not built in", built_in)
        for key, built_in in (("total", "weighted_sum"), ("advantage", "grpo"), ("normaliser", "completion"))
    },
    "evaluation.encoder": (_is_given, "reads files elsewhere", "null"),
    "prompt.template": (lambda name: name not in TEMPLATES, "reads the question from a file elsewhere", "think_answer"),
    "cluster.address": (_is_given, "connects there", "null"),
    "cluster.interface": (_is_given, "listens there", "null"),
    "tracking": (lambda names: "wandb" in names, "sends figures and images to W&B", "[tensorboard]"),
}
HONOURED = ("model.path", "data.path", "data.images", "evaluation.also.path", "evaluation.also.images")


def run_folder_of(file: Path) -> Path | None:
    """The folder of the run or exported model that contains a file, at any depth; None if there is none.

    For a link both its own place and its target's are checked.
    """
    for path in (Path(os.path.abspath(file)), file.resolve()):
        for folder in path.parents:
            if _is_run(folder):
                here = Path.cwd()
                return folder.relative_to(here) if folder != here and folder.is_relative_to(here) else folder
    return None


def _is_run(folder: Path) -> bool:
    marks = (*EXPORTS, *RECORDS) if (folder / "config.yaml").exists() else EXPORTS
    return any((folder / mark).exists() for mark in marks)


def refuse_unsaid(config: Config, typed: set[str], file: Path) -> None:
    """Refuse values in `CAUTIONS` that a run's `file` sets and the command line does not. `typed`: its keys.

    Raises:
        UserError: there are such values; the message names each key, its effect, and what to type.
    """
    problems = []
    for key, (is_cautioned, does, instead) in CAUTIONS.items():
        value = _value(config, key)
        if value is not None and key not in typed and is_cautioned(value):
            words = f"{key}={str(value).lower() if value is True else value}"
            problems.append(f"{_typed(words)}  {does}; without it: {key}={instead}")
    for name, weight in config.rewards.items():
        if _is_own_code(name) and f"rewards.{name}" not in typed:
            problems.append(f"{_typed(f'rewards.{name}={weight:g}')}  runs a function that is not built in")
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(
            f"{file} lies in a run's folder, which may be a stranger's. These values of it count only if the command "
            f"repeats them. If you trust it, add to the command:\n  {lines}"
        )


def _value(config: Config, key: str) -> Any:
    """The value of a key; None if a section that it lies in is left out."""
    return reduce(lambda section, name: None if section is None else getattr(section, name), key.split("."), config)


def _typed(words: str) -> str:
    """The words quoted for a shell. Control characters are escaped; such words can be shown but not typed."""
    return shown(shlex.quote(words))


def settled(config: Config, folder: Path, typed: set[str]) -> Config:
    """Adapt the configuration of a run to its present `folder`: its records go there, and data beside it are found."""
    run = {"folder": folder.parent, "name": folder.name}
    run = {name: value for name, value in run.items() if f"run.{name}" not in typed}
    update: dict[str, Any] = {"run": config.run.model_copy(update=run)}
    update["data"] = _data_beside(config.data, "data", folder, config.run.folder, typed)
    if also := config.evaluation.also:
        also = _data_beside(also, "evaluation.also", folder, config.run.folder, typed)
        update["evaluation"] = config.evaluation.model_copy(update={"also": also})
    return config.model_copy(update=update)


def _data_beside(data: D, key: str, folder: Path, saved: Path, typed: set[str]) -> D:
    """The section `key` with its paths as `_beside` finds them, except typed ones."""
    paths = {name: getattr(data, name) for name in ("path", "images") if f"{key}.{name}" not in typed}
    return data.model_copy(update={name: _beside(path, folder, saved) for name, path in paths.items()})


def _beside(path: Path | None, folder: Path, saved: Path) -> Path | None:
    """Resolve a relative path from where the run was started (above `saved`), if it does not exist from here."""
    if path is None or path.is_absolute() or path.exists() or saved.is_absolute():
        return path
    above = Path(os.path.abspath(folder)).parents[len(saved.parts) :]
    return next((base / path for base in [*above[:1], folder.parent, folder] if (base / path).exists()), path)
