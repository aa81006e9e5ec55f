"""Calls of functions that the configuration names, with one clear message for any mistake in a user's own function."""

import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import slip


def is_async(function: Callable[..., Any]) -> bool:
    """Return True for an `async def`, and for an object whose `__call__` is one."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


@dataclass(frozen=True)
class Function:
    """A function. `what` names it in messages (`algorithm.advantage: 'mine:f'`); `form` is the required signature."""

    what: str
    form: str
    function: Callable[..., Any]

    @cached_property
    def _signature(self) -> inspect.Signature:
        """A property, because inspecting a function takes longer than most calls."""
        return inspect.signature(self.function)

    def check_takes(self, *arguments: Any) -> None:
        """Raise UserError if the function is `async`, or cannot be called with so many arguments."""
        if is_async(self.function):
            raise UserError(f"{self.what} is async, but a plain function is called here: write def, not async def")
        try:
            self._signature.bind(*arguments)
        except TypeError as error:
            raise UserError(f"{self.what} cannot be called as {self.form}: {error}") from error
        except ValueError:
            return  # some of Python's own functions have no signature: the call itself will tell

    def __call__(self, *arguments: Any) -> Any:
        """Call the function. Returns its answer, unchecked; of a generator, the list of its values.

        Raises:
            UserError: the function does not take these arguments, or raised.
        """
        self.check_takes(*arguments)
        try:
            answer = self.function(*arguments)
            return list(answer) if isinstance(answer, Iterator) else answer  # a generator's errors come only here
        except Exception as error:
            raise slip(self.what, error) from error

    def numbers(self, answer: Any, count: int, least: float = -math.inf) -> list[float]:
        """Check that `answer`, or a part of it, is a list of `count` finite numbers, none below `least`.

        Raises:
            UserError: it is something else.
        """
        try:
            values = [float(value) for value in answer]
        except (TypeError, ValueError, OverflowError):
            values = []
        if len(values) != count or not all(math.isfinite(value) and value >= least for value in values):
            bound = "" if least == -math.inf else f", none below {least:g},"
            raise UserError(
                f"{self.what} must return {count} finite numbers{bound} here, as {self.form}; it returned "
                f"{reprlib.repr(answer)}"
            )
        return values

    def groups(self, answer: Any, sizes: Sequence[int]) -> list[list[float]]:
        """Check that `answer` has one list of finite numbers for each group, with these `sizes`.

        Raises:
            UserError: it is something else.
        """
        groups = list(answer) if isinstance(answer, Iterable) else []
        if len(groups) != len(sizes):
            raise UserError(
                f"{self.what} must return a list for each of {len(sizes)} groups here, as {self.form}; it returned "
                f"{reprlib.repr(answer)}"
            )
        return [self.numbers(group, size) for group, size in zip(groups, sizes, strict=True)]
