"""Plots of an evaluation and of a sweep. Text from data and models is drawn literally, never as markup."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from rft_cluster.classification.fonts import drawable, escaped, families_for
from rft_cluster.common.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_CLASSES = 40  # with more classes there is no room for names
CATEGORIES_UPRIGHT = 6  # with more categories their names are turned
INK, ACCENT = "#22313f", "#1f77b4"
_ONE_AT_A_TIME = Lock()  # matplotlib's settings are the process's; each tracker draws in a thread of its own


def draw_evaluation(report: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw the confusion matrix of a `report.report`, with accuracies and their 95 % intervals, into a PNG file."""
    with fonts_for([title, *report["confusion"]["columns"]]) as missing:
        save_figure(evaluation_figure(report, title, missing), path)


def evaluation_figure(report: Mapping[str, Any], title: str, missing: set[str]) -> "Figure":
    """The figure of `draw_evaluation`. Classes whose names contain `missing` characters are shown by number."""
    side = _side(report["confusion"])
    figure = new_figure(side + 3, side)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    _explain(figure, _named_confusion(left, report["confusion"], title, missing))
    bars = {
        "strict": report["greedy"]["strict"],
        "vote": report["vote"]["strict"],
        "lenient": report["greedy"]["lenient"],
        "format": report["greedy"]["format"],
    }
    _points(right, list(bars), list(bars.values()))
    right.set_title(f"{report['images']} images", color=INK)
    return figure


def draw_confusion(confusion: Mapping[str, Any], title: str, file: BinaryIO) -> None:
    """Draw a `report.confusion` alone, as a PNG."""
    with fonts_for([title, *confusion["columns"]]) as missing:
        figure = new_figure(_side(confusion) + 1, _side(confusion))
        _explain(figure, _named_confusion(figure.subplots(), confusion, title, missing))
        figure.savefig(file, format="png", dpi=90, metadata={"Software": None})


def _side(confusion: Mapping[str, Any]) -> float:
    """Inches of a confusion matrix with its names."""
    return 5 + 0.16 * min(len(confusion["rows"]), NAMED_CLASSES)


def _named_confusion(axes: "Axes", confusion: Mapping[str, Any], title: str, missing: set[str]) -> Sequence[str]:
    """Draw a confusion matrix with the names of its classes. Returns the legend of numbered names."""
    rows, columns = confusion["rows"], confusion["columns"]
    _draw_confusion(axes, np.array(confusion["counts"]))
    axes.set_title(escaped(title, missing), loc="left", color=INK)
    if len(rows) > NAMED_CLASSES:
        return []
    names, legend = drawable(columns, missing)
    axes.set_xticks(range(len(columns)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), names[: len(rows)])
    return legend


def _draw_confusion(axes: "Axes", counts: np.ndarray) -> None:  # [labels, answers]
    """Colour cells by the share of the label's images, and write the counts where there is room."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xlabel("answered")
    axes.set_ylabel("label")
    axes.figure.colorbar(image, ax=axes, shrink=0.6, label="share of the label's images")
    if len(counts) <= NAMED_CLASSES:
        size = min(9.0, max(4.0, 160 / counts.shape[1]))
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else INK
            number = str(counts[row, column])
            axes.text(column, row, number, ha="center", va="center", fontsize=size, color=colour)


def _explain(figure: "Figure", legend: Sequence[str]) -> None:
    """Write the legend of numbered names below the plot."""
    if not legend:
        return
    from matplotlib.lines import Line2D

    nothing = [Line2D([], [], linestyle="") for _ in legend]
    title = "names for which no font is installed"
    figure.legend(nothing, legend, loc="outside lower center", ncols=3, frameon=False, title=title, handlelength=0)


def draw_sweep(series: Mapping[str, Sequence[tuple[float | str, Mapping[str, Any]]]], axis: str, path: Path) -> None:
    """Plot test accuracies, one colour a series; a series is a list of (value on `axis`, `repeats.summary`).

    A row of several seeds has a small point for each, and bars from the lowest to the highest around the median; a
    single run has its 95 % interval. Below are the differences by seed from the row that others are compared with.
    Rows are not joined by lines: the values are categories, with nothing measured between them.
    """
    places = list(dict.fromkeys(value for points in series.values() for value, _ in points))
    paired = any(row["against"] for points in series.values() for _, row in points)
    with fonts_for([axis, *series, *map(str, places)]) as missing:
        figure = new_figure(max(7, 0.6 * len(places)), 7 if paired else 4.5)
        upper, *lower = figure.subplots(2 if paired else 1, sharex=True, squeeze=False)[:, 0]
        for index, (name, points) in enumerate(series.items()):
            at = [places.index(value) + 0.12 * (index - (len(series) - 1) / 2) for value, _ in points]
            ends = [{"rate": row["rate"], "interval": row["interval"] or row["range"]} for _, row in points]
            _points(upper, at, ends, label=escaped(name, missing), color=f"C{index}")
            for place, (_, row) in zip(at, points, strict=True):
                _seeds(upper, place + 0.05, row["rates"], f"C{index}")
                if row["against"]:
                    _seeds(lower[0], place + 0.05, row["against"]["differences"], f"C{index}")
                    lower[0].plot(place, 100 * row["against"]["median"], "o", color=f"C{index}")
        for axes in lower:
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set_ylabel("difference by seed,\npoints")
            axes.grid(axis="y", alpha=0.3)
        lowest = lower[0] if lower else upper
        lowest.set_xticks(range(len(places)), [escaped(str(place), missing) for place in places])
        if len(places) > CATEGORIES_UPRIGHT:
            lowest.tick_params(axis="x", rotation=60)
        lowest.set_xlabel(escaped(axis, missing))
        several = any(row["interval"] is None for points in series.values() for _, row in points)
        upper.set_ylabel(f"test accuracy, %\n{'median and range over seeds' if several else '95 % interval'}")
        upper.set_xlim(-0.5, len(places) - 0.5)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        save_figure(figure, path)


def _seeds(axes: "Axes", place: float, rates: Sequence[float], color: str) -> None:
    """A small point for each seed."""
    axes.plot([place] * len(rates), np.multiply(100, rates), ".", color=color)


def _points(
    axes: "Axes",
    at: Sequence[float] | Sequence[str],
    rates: Sequence[Mapping[str, Any]],
    *,
    label: str | None = None,
    color: str = ACCENT,
) -> None:
    middle = np.array([100 * rate["rate"] for rate in rates])
    low, high = (np.array([100 * rate["interval"][end] for rate in rates]) for end in (0, 1))
    errors = np.maximum([middle - low, high - middle], 0)  # [below and above, points]
    axes.errorbar(at, middle, errors, fmt="o", capsize=4, color=color, label=label)
    if label is None:
        for place, (value, top) in enumerate(zip(middle, high, strict=True)):
            above = axes.annotate(f"{value:.1f}", (place, top), (0, 3), textcoords="offset points", ha="center")
            above.set_fontsize(8)
        axes.tick_params(axis="x", rotation=60)
        axes.set_xlim(-0.5, len(at) - 0.5)
        axes.set_ylabel("%")
    axes.set_ylim(-2, 106)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def fonts_for(texts: Sequence[str]) -> Iterator[set[str]]:
    """Within this context texts are drawn literally, in fonts that have them. Yields the characters no font has."""
    from matplotlib import rc_context  # takes a second to import

    with _ONE_AT_A_TIME:
        families, missing = families_for(texts)
        log = logging.getLogger("matplotlib.font_manager")
        before = log.level
        log.setLevel(logging.ERROR)  # matplotlib warns about every fallback font without a normal weight
        try:
            with rc_context({"font.family": families, "text.parse_math": False}):
                yield missing
        finally:
            log.setLevel(before)


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # takes a second to import

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write the PNG. It contains no date or version: equal plots, equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    write_bytes(path, file.getvalue())
