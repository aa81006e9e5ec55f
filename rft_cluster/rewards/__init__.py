"""Rewards: plain functions `(prompt, completion) -> float`, weighted in the config.

    rewards:
      format: 1.0
      accuracy: 1.0
      my_package.my_module:brevity: 0.1     # a function of your own

To add a built-in one: write the function in a file of this folder and name it in `REWARDS`. Those run in the reward
actor's process, a user's own in one that may break (`isolation.py`, docs/rewards.md).
"""

import difflib
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from rft_cluster.errors import UserError
from rft_cluster.messages import Completion, Prompt
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.containment import containment_reward
from rft_cluster.rewards.format import format_reward

RewardFunction = Callable[[Prompt, Completion], float]

REWARDS: dict[str, RewardFunction] = {
    "format": format_reward,
    "accuracy": accuracy_reward,
    "containment": containment_reward,
}


def load_rewards(weights: dict[str, float]) -> list[tuple[str, float, RewardFunction]]:
    """Name, weight and function of each configured reward, in the config's order.

    Raises:
        UserError: no reward is given, a name is unknown, or a weight is not a finite number.
    """
    if not weights:
        raise UserError("rewards: none is given; set at least one, e.g. rewards.accuracy=1.0")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"rewards.{name}: the weight must be a finite number, got {weight}")
    return [(name, weight, find_function(name, REWARDS, "rewards")) for name, weight in weights.items()]


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
