"""Figures in a run's records, for people. A record may be damaged, or a stranger's."""

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def finite(value: object) -> float | None:
    """The number, or None if it is none that is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def rounded(value: object, digits: int) -> float | None:
    """As `finite`, to so many significant digits: each more is a byte of every number in a page."""
    number = finite(value)
    return None if number is None else float(f"{number:.{digits}g}")


def thinned(values: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
