"""Configuration: YAML, then `section.key=value` overrides, then checks; nothing starts before all of it is right.

    config = load_config("digits", ["schedule.steps=10", "optimizer.learning_rate=1e-4"])

A bare name is looked up in the working folder and then in `configs/`. Unknown keys are refused with the nearest
right one. OmegaConf merges files and overrides, pydantic checks them.
"""

import difflib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from rft_cluster.common.errors import UserError
from rft_cluster.config.sections import DEFAULT_REWARDS, Config

CONFIG_FOLDERS = (Path("."), Path("configs"), Path(__file__).parents[2] / "configs")


def load_config(name: str, overrides: list[str]) -> Config:
    """Read a config by name or path, apply `section.key=value` overrides, check everything.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest right one is named), or a value
            is wrong (key, value and what is allowed are named).
    """
    path = _find(name)
    try:
        # OmegaConf says OSError of a file that holds a bare number or the like.
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise UserError(f"{path} must hold sections (run:, model:, ...), not a list")
        if "rewards" not in loaded:
            loaded["rewards"] = DEFAULT_REWARDS  # so that an override changes one and leaves the other
        merged = OmegaConf.merge(loaded, *map(_override, overrides))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} or an override of it cannot be read: {error}") from error
    except OSError as error:
        raise UserError(f"{path} must hold sections (run:, model:, ...): {error}") from error
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise UserError(f"{path} with its overrides is not a valid configuration:\n{problems}") from error


def _find(name: str) -> Path:
    candidates = [folder / f"{name}{suffix}" for suffix in ("", ".yaml") for folder in CONFIG_FOLDERS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({path.stem for folder in CONFIG_FOLDERS[1:] for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"config {name!r} is neither a file nor one of {', '.join(known) or 'configs/'}.{hint}")


def _override(override: str) -> DictConfig:
    """`section.key=value` as a configuration of this one value. A reward's name is a key with its dots."""
    key, equals, value = override.partition("=")
    if not equals or "." not in key or key.endswith("."):
        raise UserError(f"override {override!r} must look like section.key=value, e.g. schedule.steps=10")
    section, _, name = key.partition(".")
    if section == "rewards":
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"]))["x"]
        read = OmegaConf.create({section: {name: value}})
    else:
        read = OmegaConf.from_dotlist([override])
    if OmegaConf.missing_keys(read):
        raise UserError(f"override {override!r}: ??? only marks a value that is missing; give one")
    return read


def _explain(problem: Any) -> str:
    """One line for one of pydantic's errors: the key, the value, what is allowed."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path) or "configuration"
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.5)
        right = (
            f"did you mean {'.'.join([*path[:-1], near[0]])}?"
            if near
            else "known here: " + ", ".join(section.model_fields)
        )
        return f"{key}: unknown key; {right}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"] == "truth_value":
        return f"{key}.{problem['msg']}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{key}: {message}"
    return f"{key}: {message}, got {problem['input']!r}"
