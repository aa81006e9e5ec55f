"""Find what a configuration names: a function that is built in, or one of the user's own by its dotted path."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from rft_cluster.common.errors import UserError


def find_function(name: str, known: Mapping[str, Callable[..., Any]], key: str) -> Callable[..., Any]:
    """The function that a config names: one of `known`, or by dotted path `package.module:function`.

    The last separator may be a dot as well. `key` is the config key, for the messages. An import error inside
    the user's own module keeps its traceback.

    Raises:
        UserError: the name is unknown, or there is no such module or function in it.
    """
    if name in known:
        return known[name]
    module_name, separator, function_name = name.rpartition(":" if ":" in name else ".")
    if not separator:
        raise UserError(
            f"{key}: {name!r} is unknown.{_nearest(name, known)} Known are {', '.join(sorted(known))}; "
            f"a function of your own is given as package.module:function"
        )
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise UserError(f"{key}: {name!r} is not a dotted path of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's module imports is missing
        raise UserError(
            f"{key}: {name!r} cannot be found: there is no module {error.name!r}. Run from the folder that "
            f"holds it, or install it"
        ) from error
    functions = {k: v for k, v in vars(module).items() if callable(v)}
    if function_name not in functions:
        near = _nearest(function_name, functions)
        raise UserError(f"{key}: {name!r} cannot be found: {module_name} has no function {function_name!r}.{near}")
    return functions[function_name]


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
