"""Do probabilities mean what they say? Figures with 95 % intervals, from P(class | image) and the labels (pure).

    probability_report(after, votes, right, ...)    all of it, for evaluation.json
    calibration_figures(probabilities, right)       of one P

Intervals are percentiles of `RESAMPLES` bootstrap samples of the images (Efron and Tibshirani 1993, chapter 13), drawn
from a fixed seed: the same images give the same intervals. Those of rates are Wilson's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import ROUND_DOWN, Decimal
from functools import partial
from typing import Any

import numpy as np

from rft_cluster.classification.intervals import rate, rate_line
from rft_cluster.classification.probabilities import Scores, at_temperature, fit_temperature, log_loss, softmax

BINS = 15  # of equal width, as in Guo et al. 2017 (arXiv 1706.04599)
RESAMPLES = 1000
WANTED = 0.95  # accuracy of what is answered
TOP = 5
MOST_POINTS = 200  # of a curve

Statistic = Callable[[np.ndarray], float]  # weights of the images [n] -> a figure


def probability_report(
    after_greedy: Sequence[Scores | None],
    after_votes: Sequence[Sequence[Scores | None]],
    right: np.ndarray,
    classes: int,
    temperature: float | None,
    grey: Scores | None = None,
) -> dict[str, Any]:
    """The figures of P for `evaluation.json`.

    Args:
        after_greedy: of each of n images, after its greedy reasoning, or of a question without reasoning.
        after_votes: the same after several sampled reasonings; empty if they were not scored.
        right: the labels' indices [n].
        classes: how many there are.
        temperature: that of the card; None if none was fitted.
        grey: of an image without content, to compare `METHODS`; None to leave that one out.
    """
    alone = [[scores] for scores in after_greedy]
    report = {
        "temperature": temperature,
        **calibration_figures(at_temperature(alone, classes, temperature or 1.0), right),
        "methods": _methods(after_greedy, right, classes, grey),
    }
    if temperature is not None:
        report["unfitted"] = short_figures(at_temperature(alone, classes, 1.0), right)
    if after_votes:
        report["votes"] = short_figures(at_temperature(after_votes, classes, temperature or 1.0), right)
    return report


def short_figures(probabilities: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Three of the `calibration_figures`."""
    figures = calibration_figures(probabilities, right)
    return {name: figures[name] for name in ("accuracy", "log_loss", "calibration_error")}


def _methods(
    scores: Sequence[Scores | None], right: np.ndarray, classes: int, grey: Scores | None
) -> dict[str, dict[str, float]]:
    """Each method's accuracy and log-loss, at the temperature that suits it best on these images."""
    kinds: dict[str, Callable[[Scores], np.ndarray]] = {"joint": lambda one: one.joint,
                                                        "per_token": lambda one: one.per_token}  # fmt: skip
    if grey:
        kinds["grey"] = lambda one: one.joint - grey.joint
    found = {}
    for name, kind in kinds.items():
        values = np.array([np.zeros(classes) if one is None else kind(one) for one in scores])
        best = softmax(values, fit_temperature(partial(softmax, values), right))
        found[name] = {"accuracy": float(_hits(best, right).mean()),
                       "log_loss": float(log_loss(best, right).mean())}  # fmt: skip
    return found


def calibration_figures(probabilities: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Args:
        probabilities: P [n, K] of n images.
        right: the labels' indices [n].

    Where all classes are equally probable nothing was said, and nothing is right.

    Returns:
        `accuracy` and `top5` (rates; no `top5` with 5 classes or fewer), `log_loss` (nats), `calibration_error`,
        `coverage` (see `coverage_at`), each with its interval; `reliability`: the bins that hold images; `curve`:
        coverage and accuracy, as the less sure images are added.
    """
    order = np.argsort(-probabilities.max(axis=1), kind="stable")  # the surest first
    probabilities, right = probabilities[order], right[order]
    sure, hit = probabilities.max(axis=1), _hits(probabilities, right)
    losses = log_loss(probabilities, right)
    figures: dict[str, Any] = {"accuracy": rate(hit.tolist())}
    if probabilities.shape[1] > TOP:
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
        figures["top5"] = rate((_said(probabilities) & (best == right[:, None]).any(axis=1)).tolist())
    _, threshold = coverage_at(sure, hit)
    below = None if threshold is None else max(sure[sure < threshold].tolist(), default=0.0)
    statistics: dict[str, Statistic] = {
        "log_loss": lambda weights: float(np.average(losses, weights=weights)),
        "calibration_error": lambda weights: calibration_error(sure, hit, weights),
        "coverage": lambda weights: coverage_at(sure, hit, weights)[0],
    }
    found = with_intervals(statistics, len(right))
    return {
        **figures,
        **found,
        "coverage": {"accuracy": WANTED, **found["coverage"], "threshold": threshold, "below": below},
        "reliability": list(_reliability(sure, hit)),
        "curve": _curve(sure, hit),
    }


def _said(probabilities: np.ndarray) -> np.ndarray:
    """[n]: False where all classes are equally probable."""
    return np.ptp(probabilities, axis=1) > 0


def _hits(probabilities: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n]: whether the most probable class is right."""
    return _said(probabilities) & (probabilities.argmax(axis=1) == right)


def calibration_error(sure: np.ndarray, hit: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The expected calibration error, 0 to 1: the mean over images of |confidence - accuracy| of the image's bin.

    With few images it is above 0 even for perfect probabilities, and so is its bootstrap interval.
    """
    weights = np.ones(len(sure)) if weights is None else weights
    gaps = np.bincount(_bins(sure), weights * (sure - hit), BINS)
    return float(np.abs(gaps).sum() / weights.sum())


def coverage_at(sure: np.ndarray, hit: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float | None]:
    """The largest share of the images, the surest first, of which at least `WANTED` are right; and the probability of
    the last of these: whoever answers from there on answers so many. (0, None) if there is no such share.

    `sure` falls. Images that are equally sure are answered together.
    """
    weights = np.ones(len(sure)) if weights is None else weights
    last = np.append(sure[:-1] > sure[1:], True)  # of those that are equally sure
    answered = np.cumsum(weights)
    accurate = np.cumsum(weights * hit) >= WANTED * answered - 1e-9
    found = np.flatnonzero(last & accurate & (answered > 0))
    return (float(answered[found[-1]] / answered[-1]), float(sure[found[-1]])) if len(found) else (0.0, None)


def with_intervals(statistics: Mapping[str, Statistic], images: int) -> dict[str, dict[str, Any]]:
    """Each figure of all images, and its bootstrap interval."""
    draw, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        weights = np.bincount(draw.integers(images, size=images), minlength=images).astype(float)
        found.append([statistic(weights) for statistic in statistics.values()])
    whole, ends = np.ones(images), np.percentile(found, (2.5, 97.5), axis=0)
    return {
        name: {"value": statistic(whole), "interval": ends[:, number].tolist()}
        for number, (name, statistic) in enumerate(statistics.items())
    }


def _bins(sure: np.ndarray) -> np.ndarray:
    """A bin has its upper end, as 1.0 shall be in the last."""
    return np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)


def _reliability(sure: np.ndarray, hit: np.ndarray) -> Iterator[dict[str, Any]]:
    """Each bin that holds images: its mean confidence, and how many of its images are right."""
    bins = _bins(sure)
    for number in range(BINS):
        own = bins == number
        if own.any():
            yield {"low": number / BINS, "high": (number + 1) / BINS, "confidence": float(sure[own].mean()),
                   **rate(hit[own].tolist())}  # fmt: skip


def _curve(sure: np.ndarray, hit: np.ndarray) -> dict[str, list[float]]:
    """Coverage, and the accuracy of what is answered, at up to `MOST_POINTS` places."""
    counts = np.arange(1, len(sure) + 1)
    last = np.flatnonzero(np.append(sure[:-1] > sure[1:], True))
    shown = last[np.unique(np.linspace(0, len(last) - 1, min(MOST_POINTS, len(last))).astype(int))]
    accuracy = np.cumsum(hit) / counts
    return {"coverage": (counts[shown] / len(sure)).tolist(), "accuracy": accuracy[shown].tolist()}


def probability_lines(figures: Mapping[str, Any]) -> list[str]:
    """For people: a `probability_report`, with `fitted_on`, the number of images that the temperature is from."""

    def ends(figure: Mapping[str, Any], scale: float = 1, digits: int = 2) -> str:
        low, high = figure["interval"]
        return f"{scale * figure['value']:.{digits}f} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"

    def both(figure: Mapping[str, Any]) -> str:
        return f"log-loss {ends(figure['log_loss'])}, calibration error {ends(figure['calibration_error'], 100, 1)} %"

    def right(figures: Mapping[str, Any]) -> str:
        return f"{100 * figures['accuracy']['rate']:.1f} % right"

    lines = [rate_line("most probable", figures["accuracy"]) + "   (of all classes: predict --closed)"]
    if "top5" in figures:
        lines.append(rate_line("among the 5 most", figures["top5"]))
    images = figures["fitted_on"]
    fitted = f"temperature {figures['temperature']:g}, fitted on {images} validation images" if images else ""
    lines.append(f"probabilities: {both(figures)}; {fitted or 'not calibrated'}")
    if "unfitted" in figures:
        lines.append(f"  without that temperature: {both(figures['unfitted'])}")
    if "votes" in figures:
        lines.append(
            f"  averaged over the reasonings of the votes: {right(figures['votes'])}, {both(figures['votes'])}"
        )
    if "second_look" in figures:
        second = figures["second_look"]
        lines.append(f"  after a second look: {right(second)}, {both(second)}")
    coverage, threshold = figures["coverage"], figures["coverage"]["threshold"]  # `below`: the next less sure image's
    wanted = f"{100 * coverage['accuracy']:.0f} % of the answers right"
    if threshold is None:
        lines.append(f"  no share of the images can be answered with {wanted}")
    else:
        below = _floor(threshold, coverage["below"])
        lines.append(f"  {ends(coverage, 100, 1)} % of the images can be answered with {wanted} "
                     f"(predict --unsure-below {below}, a threshold that these images gave)")  # fmt: skip
    return lines


def calibration_line(name: str, record: Mapping[str, Any]) -> str:
    """For people: a model of `calibration.json`."""
    before, after = record["unfitted"], record["fitted"]
    errors = " to ".join(f"{100 * one['calibration_error']['value']:.1f}" for one in (before, after))
    losses = " to ".join(f"{one['log_loss']['value']:.2f}" for one in (before, after))
    return (
        f"probabilities of {name} are calibrated on {record['images']} validation images: temperature "
        f"{record['temperature']:g} brings the calibration error from {errors} %, the log-loss from {losses}"
    )


def _floor(threshold: float, below: float) -> str:
    """With 3 decimals or as many as it takes: the last image that reached it still does, and the next one does not."""
    for digits in range(3, 16):
        rounded = Decimal(threshold).quantize(Decimal(10) ** -digits, ROUND_DOWN)
        if rounded > below:
            return f"{rounded.normalize():f}"
    return repr(threshold)
