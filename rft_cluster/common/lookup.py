"""Find the function that a configuration names: a built-in one, or the user's own by its dotted path."""

import difflib
import importlib
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown

LIBRARIES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
# Folders of code that the user did not write: the interpreter, its libraries, this package.
ELSEWHERE = ("<frozen ", "<string>", *(f"{folder}{os.sep}" for folder in (*LIBRARIES, Path(__file__).parents[1])))


def find_function(name: str, known: Mapping[str, Callable[..., Any]], key: str) -> Callable[..., Any]:
    """Return the function called `name`: one of `known`, or one by its dotted path `package.module:function`.

    A dot may replace the colon. `key` is the config key, for the messages.

    Raises:
        UserError: the name is unknown, the module or function does not exist, or the module cannot be imported.
    """
    if name in known:
        return known[name]
    module_name, function_name = split_name(name, known, key)
    module = _import(module_name, f"{key}: {name!r}")
    functions = {k: v for k, v in vars(module).items() if callable(v)}
    if function_name not in functions:
        near = did_you_mean(function_name, functions)
        raise UserError(f"{key}: {name!r} cannot be found: {module_name} has no function {function_name!r}.{near}")
    return functions[function_name]


def split_name(name: str, known: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Split a dotted path into module and function, without an import. `known`: other valid names, for the message.

    Raises:
        UserError: `name` is not a dotted path, or is the path of a file.
    """
    module, separator, function = name.rpartition(":" if ":" in name else ".")
    if not separator:
        built_in = f" is unknown.{did_you_mean(name, known)} Known are {', '.join(sorted(known))};" if known else ":"
        raise UserError(f"{key}: {name!r}{built_in} a function of your own is given as package.module:function")
    if module.endswith(".py") or "/" in module:
        dotted = f"{module.removeprefix('./').removesuffix('.py').replace('/', '.')}:{function}"
        raise UserError(f"{key}: {name!r} names a file: name the module, as in an import. Did you mean {dotted}?")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise UserError(f"{key}: {name!r} is not a dotted path of the form package.module:function")
    return module, function


def _import(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise UserError(
                f"{what} cannot be found: there is no module {missing!r}. Run from the folder that holds it, or "
                f"install it"
            ) from error
        raise slip(what, error) from error


def slip(what: str, error: BaseException) -> UserError:
    """A UserError for an exception in the user's own code: `what`, file, line, the exception, the user's frames."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(ELSEWHERE)]
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{Path(error.filename).name}, line {error.lineno}: "
    elif own:
        place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}: "
    else:
        place = ""
    *source, text = traceback.format_exception_only(error)
    lines = "".join([*traceback.format_list(own), *(source if isinstance(error, SyntaxError) else [])]).rstrip()
    return UserError(f"{what}: {place}{text.strip()}" + (f"\n{lines}" if lines else ""))


def near_path(path: Path) -> str:
    """A hint for a missing path, ". Did you mean PATH?", or an empty text.

    PATH exists and differs from `path` only in its first missing part, which is replaced by a similar name.
    """
    try:
        missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
        if missing is None:
            return ""
        beside = {entry.name.casefold(): entry for entry in sorted(missing.parent.iterdir())}
    except OSError:  # a folder without read permission, or a file
        return ""
    near = difflib.get_close_matches(missing.name.casefold(), beside, n=3)
    meant = [beside[name] / path.relative_to(missing) for name in near]
    return next((f". Did you mean {shown(str(one))}?" for one in meant if one.exists()), "")


def nearest(name: str, known: Iterable[str], least: float = 0.6) -> str | None:
    """The known name that is most similar to `name`, if one is at least `least` so, of 1 for equal."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=least)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that ends a message, " Did you mean NAME?", or an empty text."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""
