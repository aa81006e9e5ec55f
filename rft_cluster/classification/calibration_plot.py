"""The reliability diagram, and how accurate answers are if the less sure images are left out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rft_cluster.classification.fonts import escaped
from rft_cluster.classification.plots import ACCENT, INK, fonts_for, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_calibration(figures: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw the figures of `calibration.probability_report` into a PNG file."""
    with fonts_for([title]) as missing:
        save_figure(calibration_figure(figures, escaped(title, missing)), path)


def calibration_figure(figures: Mapping[str, Any], title: str) -> "Figure":
    """The figure of `draw_calibration`."""
    figure = new_figure(10, 5)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, x=0.01, ha="left", color=INK)
    _draw_reliability(left, figures)
    _draw_coverage(right, figures)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_reliability(axes: "Axes", figures: Mapping[str, Any]) -> None:
    """Accuracy of each bin, with its 95 % interval, over its mean probability; the area of a point is its images."""
    bins = figures["reliability"]
    at = np.array([100 * one["confidence"] for one in bins])
    middle = np.array([100 * one["rate"] for one in bins])
    low, high = (np.array([100 * one["interval"][end] for one in bins]) for end in (0, 1))
    counts = np.array([one["n"] for one in bins])
    axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":", label="as probable as right")
    axes.errorbar(at, middle, np.maximum([middle - low, high - middle], 0), fmt="none", capsize=3, color=ACCENT)
    axes.scatter(at, middle, s=15 + 300 * counts / counts.sum(), color=ACCENT)
    axes.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="probability of the answer, %", ylabel="right, %")
    axes.set_title(f"calibration error {100 * figures['calibration_error']['value']:.1f} %", color=INK)
    axes.legend(frameon=False, loc="upper left")


def _draw_coverage(axes: "Axes", figures: Mapping[str, Any]) -> None:
    curve, coverage = figures["curve"], figures["coverage"]
    axes.plot(100 * np.array(curve["coverage"]), 100 * np.array(curve["accuracy"]), color=ACCENT)
    axes.axhline(100 * coverage["accuracy"], color=INK, linewidth=1, linestyle=":")
    axes.set(xlim=(0, 102), xlabel="images that are answered, the surest first, %", ylabel="right of these, %")
    axes.set_ylim(top=100.5)
    wanted = f"{100 * coverage['accuracy']:.0f} %"
    axes.set_title(f"{100 * coverage['value']:.1f} % of the images at {wanted} right", color=INK)
