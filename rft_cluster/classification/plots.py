"""Pictures for people who would rather look than read. Text from data and models is drawn as it is, never as markup."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_CLASSES = 40  # more have no room for their names
LABEL_LENGTH = 28
INK, ACCENT = "#22313f", "#1f77b4"


def draw_evaluation(report: Mapping[str, Any], title: str, path: Path) -> None:
    """The confusion matrix of a report of `report.report`, with its accuracies and their 95 % intervals."""
    confusion = report["confusion"]
    counts = np.array(confusion["counts"], dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 5 + 0.16 * min(len(confusion["rows"]), NAMED_CLASSES)
    figure = _figure(side + 3, side)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    image = left.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    left.set_xlabel("answered")
    left.set_ylabel("label")
    left.set_title(_plain(title), loc="left", color=INK)
    if len(confusion["rows"]) <= NAMED_CLASSES:
        left.set_xticks(range(len(confusion["columns"])), map(_plain, confusion["columns"]), rotation=60, ha="right")
        left.set_yticks(range(len(confusion["rows"])), map(_plain, confusion["rows"]))
    figure.colorbar(image, ax=left, shrink=0.6, label="share of the label's images")
    bars = {
        "strict": report["greedy"]["strict"],
        "vote": report["vote"]["strict"],
        "lenient": report["greedy"]["lenient"],
        "format": report["greedy"]["format"],
    }
    _points(right, list(bars), list(bars.values()))
    right.set_title(f"{report['images']} images", color=INK)
    _save(figure, path)


def draw_sweep(series: Mapping[str, Sequence[tuple[float | str, Mapping[str, Any]]]], axis: str, path: Path) -> None:
    """Test accuracy with 95 % intervals: a colour for each of `series`, whose points are (value on `axis`, rate).

    No line joins the points: values are categories, and nothing was measured between them.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    places = list(dict.fromkeys(value for points in series.values() for value, _ in points))
    for index, (name, points) in enumerate(series.items()):
        at = [places.index(value) + 0.12 * (index - (len(series) - 1) / 2) for value, _ in points]
        _points(axes, at, [rate for _, rate in points], label=_plain(name), color=f"C{index}")
    axes.set_xticks(range(len(places)), [_plain(str(place)) for place in places])
    axes.set_xlabel(_plain(axis))
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    _save(figure, path)


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
    errors = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
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


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # takes a second to import

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    """Written under another name, then renamed. No date or version goes in: the same figures give the same bytes."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    temporary.replace(path)


def _plain(text: str) -> str:
    short = text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"
    return short.replace("\\", "\\\\").replace("$", r"\$")
