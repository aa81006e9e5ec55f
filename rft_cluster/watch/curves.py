"""Curves in a terminal, drawn by plotext."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotext
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from rft_cluster.run.figures import thinned

LEAST_WIDTH, LEAST_HEIGHT = 16, 5  # below these plotext has no room for a curve and its axes
TICKS = 4  # numbers at an axis


@dataclass(frozen=True)
class Curve:
    """A figure by step, e.g. `Curve("reward", [1, 2], [0.4, 0.6])`. It fills the room that it gets."""

    title: str
    steps: Sequence[int]
    values: Sequence[float]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or 9
        if not self.values:
            yield Text(f"{self.title}: none yet", style="dim")
        elif width < LEAST_WIDTH or height < LEAST_HEIGHT or options.ascii_only:
            yield Text(f"{self.title} {self.values[-1]:.3g}")
        else:
            yield Text(drawn(self, width, height), no_wrap=True)


def drawn(curve: Curve, width: int, height: int) -> str:
    """The curve as `height` lines of `width` characters, without colours: those of the terminal are right for it."""
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    figure.title(f"{curve.title} {curve.values[-1]:.3g}")
    first, last = min(curve.steps), max(curve.steps)
    figure.ruler("x").ticks(*_ticks([round(first + i * (last - first) / (TICKS - 1)) for i in range(TICKS)]))
    low, high = _limits(curve.values)
    figure.ruler("y").lim(low, high)
    figure.ruler("y").ticks(*_ticks([low, (low + high) / 2, high]))
    # A column of the canvas has two dots; more points than that would only cost time.
    steps, values = thinned(curve.steps, 2 * width), thinned(curve.values, 2 * width)
    figure.draw(figure.signal(list(steps), list(values), marker="braille").lines())
    return plotext.uncolorize(str(figure.build())).rstrip("\n")


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: of the values, and not empty."""
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - 0.1, high + 0.1)


def _ticks(positions: Sequence[float]) -> tuple[list[float], list[str]]:
    """Positions, each once, with their numbers; the numbers of an axis have as many digits as they need to differ."""
    each = sorted(set(positions))
    for digits in range(3, 8):
        labels = [f"{position:.{digits}g}" for position in each]
        if len(set(labels)) == len(labels):
            break
    return each, labels
