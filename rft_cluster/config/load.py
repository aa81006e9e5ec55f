"""Load a configuration: YAML, then `section.key=value` overrides, then checks of all values.

    config = load_config("digits", ["schedule.steps=10", "optimizer.learning_rate=1e-4", "data.path=photos #1"])

A bare name is looked up in the working folder, then in `configs/`. The field decides how a value's text is read, so
paths and names arrive as written. Lists and mappings are in YAML: `data.classes=[no, yes]`.
"""

import os
import re
import reprlib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import check_format
from rft_cluster.common.lookup import did_you_mean, nearest
from rft_cluster.common.text import shown
from rft_cluster.config.base import Section
from rft_cluster.config.foreign import refuse_unsaid, run_folder_of, settled
from rft_cluster.config.sections import DEFAULT_REWARDS, Config
from rft_cluster.config.yaml_text import QUOTES, Text, read_yaml

SHIPPED = Path(__file__).parents[1] / "configs"  # in the repository a link; in an installed package the files
CONFIG_FOLDERS = (Path("."), Path("configs"), SHIPPED)

NO_TEXT = ("string_type", "path_type", "dict_type", "list_type")  # errors when YAML read a text as something else
S = TypeVar("S", bound=Section)


def load_config(name: str, overrides: list[str]) -> Config:
    """Read a config by name or path, apply `section.key=value` overrides, and check everything.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the message names the nearest one), a value is
            wrong (it names key, value and what is allowed), or a file in a run's folder sets what only the command line
            may set (see `foreign.py`).
    """
    file = find_config(name)
    run = run_folder_of(file)
    return load_run_config(run, file, overrides) if run else _load(read_file(file), file, overrides)[0]


def load_run_config(run: Path, file: Path, overrides: list[str], without: tuple[str, ...] = ()) -> Config:
    """Read the configuration in a run's folder, like `load_config`. `without`: keys or sections to ignore, because the
    command does not use them."""
    values = read_file(file)
    if isinstance(values.get("run"), dict):
        values["run"]["name"] = "run"  # the folder's present name may be invalid as run.name
    for key in without:
        section, _, name = key.partition(".")
        if not name:
            values.pop(section, None)
        elif isinstance(values.get(section), dict):
            values[section].pop(name, None)
    config, typed = _load(values, file, overrides)
    refuse_unsaid(config, typed, file)
    return settled(config, run, typed)


def _load(values: dict[str, Any], file: Path, overrides: list[str]) -> tuple[Config, set[str]]:
    """The configuration, and the keys that overrides set."""
    values.setdefault("rewards", DEFAULT_REWARDS)  # so that an override of one reward keeps the others
    typed = {_apply(values, override) for override in overrides}
    return validated(Config, values, f"{file} with its overrides is not a valid configuration"), typed


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file as a mapping whose scalars are `Text`.

    Raises:
        UserError: the file cannot be read, or is not a mapping.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = f".{_neighbour(path)}" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{path} cannot be read: {error.strerror}{hint}") from error
    values = read_yaml(data, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values (key: value), not {_written(values)}")
    check_format(values, path)  # only a run's record has a format number
    return values


def config_text(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def validated(model: type[S], values: dict[str, Any], complaint: str) -> S:
    """Validate `values` as a `model`. Raises UserError with `complaint` and one line for each problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(model, problem)}" for problem in error.errors())
        raise UserError(f"{complaint}:\n{problems}") from error


def find_config(name: str) -> Path:
    """The file of a config name or path. Raises UserError with the nearest name if there is none."""
    home = os.path.expanduser(name)  # shells do not expand `~` in --config=~/mine.yaml
    candidates = [folder / f"{home}{suffix}" for suffix in ("", ".yaml") for folder in CONFIG_FOLDERS]
    for candidate in candidates:
        if _is_file(candidate):
            return candidate
    known = sorted({path.stem for folder in CONFIG_FOLDERS[1:] for path in folder.glob("*.yaml")})
    hint = _neighbour(Path(home)) or did_you_mean(Path(name).stem, known)
    raise UserError(f"config {_written(name)} is neither a file nor one of {', '.join(known) or 'configs/'}.{hint}")


def _neighbour(path: Path) -> str:
    """A hint: the YAML file in the same folder with the most similar name."""
    beside = {file.name: file for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern)}
    near = nearest(path.name, beside)
    return f" Did you mean {beside[near]}?" if near else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long, or the folder cannot be listed
        return False


def _apply(values: dict[str, Any], override: str) -> str:
    """Apply one `section.key=value` to `values`, and return the key."""
    written, equals, value = override.partition("=")
    key, annotation = _field(written.strip())
    alone = len(key) == 1 and get_origin(annotation) is not list  # `tracking` is in no section
    if not equals or alone or not all(key):
        raise UserError(f"override {override!r} must look like section.key=value, e.g. schedule.steps=10")
    new: Any = Text(value)
    if _takes_yaml(annotation, value):
        new = read_yaml(value, f"override {override!r}")
    for part in key[:-1]:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, dict) else {}  # a copy: a YAML alias may share it
        values = values[part]
    old = values.get(key[-1])
    values[key[-1]] = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new
    return ".".join(key)


def _field(written: str) -> tuple[list[str], Any]:
    """The parts of a key, and the type of its value; None for an unknown key.

    The name of a mapping's entry (a reward, a label) is one part, even with dots in it.
    """
    parts = written.split(".")
    annotation: Any = Config
    for depth, part in enumerate(parts):
        kinds = _alternatives(annotation)
        if len(kinds) == 1 and get_origin(kinds[0]) is dict:
            return [*parts[:depth], ".".join(parts[depth:])], get_args(kinds[0])[1]
        section = _section(annotation)
        if section is None or part not in section.model_fields:
            return parts, None
        annotation = section.model_fields[part].annotation
    return parts, annotation


def _takes_yaml(annotation: Any, value: str) -> bool:
    """Return True if an override is to be read as a YAML list or mapping. If text is allowed too, a bracket decides."""
    kinds = _alternatives(annotation)
    collections = [kind for kind in kinds if get_origin(kind) in (list, dict, tuple) or _section(kind)]
    return bool(value.strip() and collections) and (collections == kinds or value.lstrip()[0] in "[{")


def _alternatives(annotation: Any) -> list[Any]:
    """The alternatives of a type: `X` and `Y` of `X | Y | None`, `X` of `Annotated[X, ...]`."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in _alternatives(one)]
    return [] if annotation is NoneType else [annotation]


def _section(annotation: Any) -> type[Section] | None:
    kinds = _alternatives(annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _explain(model: type[Section], problem: Any) -> str:
    """One line for one of pydantic's errors: the key, the value, what is allowed, and the line in the file."""
    # For a union type, pydantic's path also contains the name of the type, as if it were a key.
    path = [str(part) for part in problem["loc"] if not re.match(r"(literal|tuple|list|dict)\[", str(part))]
    key = shown(".".join(path)) or "configuration"
    value = problem["input"]
    line = f" (line {number})" if (number := _line(value)) else ""
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(model, path)}{line}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "empty" or (problem["type"] == "value_error" and isinstance(value, dict)):
        return f"{key}: {message}{line}"
    message, advice = _advice(model, path, problem["type"], message, value)
    return f"{key}: {message}, got {_written(value)}{advice}{line}"


def _advice(model: type[Section], path: list[str], kind: str, message: str, value: Any) -> tuple[str, str]:
    """The allowed values, in the user's words, and what to write instead."""
    if kind == "string_pattern_mismatch":
        return "may hold letters (A to Z), digits, '.', '_' and '-', and begins with a letter or digit", ""
    if isinstance(value, str) and kind in ("list_type", "tuple_type"):
        plain = re.fullmatch(r"\(?([\w ,.+-]+?),?\)?", value)
        return "must be a list", f"; write [{plain[1]}]" if plain else f"; write [ONE, ANOTHER], and {QUOTES}"
    if isinstance(value, str) and kind in ("dict_type", "model_type"):
        section = _section(model.model_fields[path[0]].annotation)
        for part in path[1:]:
            section = _section(section.model_fields[part].annotation) if section else None
        known = f": its keys are {', '.join(section.model_fields)}" if section else ""
        return "must hold keys and values", f"; write {{key: value}}{known}"
    return message, f"; {QUOTES}" if kind in NO_TEXT else ""


def _line(value: Any) -> int:
    """The line of a value's first text; 0 for an override."""
    if isinstance(value, Text):
        return value.line
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((line for one in inner if (line := _line(one))), 0)


def _nearest(model: type[Section], path: list[str]) -> str:
    section = model
    for part in path[:-1]:
        section = _section(section.model_fields[part].annotation) or section
    near = nearest(path[-1], section.model_fields, least=0.5)
    if near:
        return f"did you mean {'.'.join([*path[:-1], near])}?"
    return "known here: " + ", ".join(section.model_fields)


def _written(value: Any) -> str:
    """A value as the user wrote it, on one line and shortened."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\.?[0-9][\w.+-]{0,40}", value):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    short = reprlib.Repr()
    short.maxstring, short.maxother = 200, 200
    return short.repr(str(value) if isinstance(value, Path) else value)
