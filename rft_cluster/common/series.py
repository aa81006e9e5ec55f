"""Figures over time: what a series is, and the current value of each. `cluster/metrics.py` exports them."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Series:
    """One figure over time, e.g. `Series("rft_reward", "gauge", "reward", "Mean reward of a step.")`.

    A gauge has the newest value. A counter only grows, from 0 at the start of the process: of it one asks the growth
    in a span of time.
    """

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    meaning: str
    label: str = ""
    """The name of the label that tells apart several values of the series; every series has the label `run` beside."""

    @property
    def exported(self) -> str:
        """The name in Prometheus. Ray puts `ray_` before each name, and `_total` behind a counter's."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


Values = Mapping[tuple[Series, str], float]
"""The value of each series, by the value of its label ("" without one); counters in total."""


class Figures:
    """Values that one thread changes and another reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[Series, str], float] = {}

    def set(self, series: Series, value: float, label: str = "") -> None:
        with self._lock:
            self._values[series, label] = value

    def add(self, series: Series, value: float, label: str = "") -> None:
        """Add to a counter."""
        with self._lock:
            self._values[series, label] = self._values.get((series, label), 0.0) + value

    def read(self) -> Values:
        with self._lock:
            return dict(self._values)
