import numpy as np
import pytest
from PIL import Image

from rft_cluster.classification.calibration import (
    calibration_error,
    calibration_figures,
    coverage_at,
    probability_lines,
    probability_report,
)
from rft_cluster.classification.calibration_plot import draw_calibration
from rft_cluster.classification.probabilities import Scores, softmax


def honest(images: int, classes: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """P, and labels drawn from it."""
    draw = np.random.default_rng(1)
    found = softmax(draw.normal(0, 2, (images, classes)))
    return found, (found.cumsum(axis=1) < draw.random((images, 1))).sum(axis=1)


def test_the_calibration_error_by_hand():
    sure, hit = np.array([0.95, 0.95, 0.61, 0.61]), np.array([True, False, True, True])
    assert calibration_error(sure, hit) == pytest.approx((2 * 0.45 + 2 * 0.39) / 4)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0.0
    assert calibration_error(sure, hit, np.array([1.0, 0, 0, 0])) == pytest.approx(0.05)


def test_where_nothing_is_said_nothing_is_right():
    """Of equally probable classes the first would be taken, and the first five be among the best."""
    figures = calibration_figures(np.full((10, 10), 0.1), np.arange(10))
    assert (figures["accuracy"]["right"], figures["top5"]["right"]) == (0, 0)


@pytest.mark.parametrize(
    ("sure", "said"), [([0.99995, 0.99946, 0.9991], "0.9994"), ([0.9, 0.81234, 0.7], "0.812"), ([0.9, 0.8, 0.8], "0.8")]
)
def test_whoever_answers_from_the_printed_probability_on_answers_no_other_image(sure, said):
    """The surest are right, the last is wrong."""
    probabilities = np.array([[one, 1 - one] for one in sure])
    right = np.array([0, 0, 1] if len({*sure}) == 3 else [0, 0, 0])
    figures = {"fitted_on": 0, **calibration_figures(probabilities, right)}
    line = probability_lines(figures)[-1]
    assert f"(predict --unsure-below {said}, a threshold" in line
    assert figures["coverage"]["below"] < float(said) <= figures["coverage"]["threshold"]


def test_honest_probabilities_have_a_small_error_and_sharpened_ones_a_large_one():
    found, right = honest(2000)
    sharp = softmax(3 * np.log(found))
    honest_figures, sharp_figures = calibration_figures(found, right), calibration_figures(sharp, right)
    assert honest_figures["calibration_error"]["value"] < 0.04 < 0.1 < sharp_figures["calibration_error"]["value"]
    assert honest_figures["log_loss"]["value"] < sharp_figures["log_loss"]["value"]
    assert honest_figures["accuracy"] == sharp_figures["accuracy"]
    for figures in (honest_figures, sharp_figures):
        for name in ("log_loss", "calibration_error", "coverage"):
            low, high = figures[name]["interval"]
            assert low < high
        low, high = figures["log_loss"]["interval"]
        assert low < figures["log_loss"]["value"] < high
    assert calibration_figures(found, right) == honest_figures, "the same images give the same intervals"


def test_the_share_that_can_be_answered_with_95_percent_right():
    hit = np.array([True] * 19 + [False] + [True] * 10 + [False] * 10)
    sure = np.linspace(1, 0.2, 40)
    assert coverage_at(sure, hit) == (0.75, pytest.approx(sure[29]))  # 29 of 30 are right
    assert coverage_at(sure, np.zeros(40, bool)) == (0.0, None)
    assert coverage_at(np.full(40, 0.5), hit) == (0.0, None), "equally sure ones are answered together"
    share, threshold = coverage_at(sure, np.ones(40, bool))
    assert (share, threshold) == (1.0, sure[-1])


def test_a_rate_among_the_five_most_probable_only_where_that_says_something():
    found, right = honest(200)
    assert calibration_figures(found, right)["top5"]["rate"] > calibration_figures(found, right)["accuracy"]["rate"]
    assert "top5" not in calibration_figures(*honest(200, classes=5))


def test_the_bins_and_the_curve_hold_every_image():
    found, right = honest(500)
    figures = calibration_figures(found, right)
    assert sum(one["n"] for one in figures["reliability"]) == 500
    assert all(one["low"] < one["confidence"] <= one["high"] for one in figures["reliability"])
    curve = figures["curve"]
    assert curve["coverage"][-1] == 1.0 and len(curve["coverage"]) == 200
    assert curve["accuracy"][-1] == pytest.approx(figures["accuracy"]["rate"])


def scored(found: np.ndarray, tokens: int = 3) -> list[Scores]:
    return [Scores(np.stack([np.log(row), np.full(len(row), -1e9)]), np.full((2, len(row)), tokens)) for row in found]


@pytest.fixture(scope="module")
def report() -> dict:
    """Of probabilities that are three times too sure, at the temperature that cures it."""
    found, right = honest(400)
    after = scored(softmax(3 * np.log(found)))
    votes = [[one, None] for one in after]
    return probability_report(after, votes, right, 8, 3.0, grey=after[0]) | {"fitted_on": 200}


def test_a_report_says_what_the_temperature_does_and_compares_the_methods(report):
    assert report["log_loss"]["value"] < report["unfitted"]["log_loss"]["value"]
    assert report["calibration_error"]["value"] < report["unfitted"]["calibration_error"]["value"]
    assert report["votes"]["log_loss"]["value"] > report["log_loss"]["value"], "half of the votes say nothing"
    methods = report["methods"]
    assert methods["joint"]["accuracy"] == methods["per_token"]["accuracy"], "all names have three tokens"
    assert methods["grey"]["log_loss"] > methods["joint"]["log_loss"]


def test_a_report_without_temperature_votes_and_grey_image():
    found, right = honest(60)
    report = probability_report([None, *scored(found)[1:]], [], right, 8, None) | {"fitted_on": None}
    assert not report.keys() & {"unfitted", "votes"} and report["methods"].keys() == {"joint", "per_token"}
    assert any(line.endswith("; not calibrated") for line in probability_lines(report))


def test_a_policy_whose_answers_are_all_out_of_format_has_equal_probabilities():
    report = probability_report([None] * 60, [[None]] * 60, np.zeros(60, int), 4, None)
    assert report["log_loss"]["value"] == pytest.approx(np.log(4))
    assert report["methods"]["joint"]["log_loss"] == pytest.approx(np.log(4))


def test_the_lines_say_what_can_be_answered(report):
    lines = probability_lines(report)
    assert any("temperature 3, fitted on 200 validation images" in line for line in lines)
    rate = report["votes"]["accuracy"]["rate"]
    assert any(
        line.startswith(f"  averaged over the reasonings of the votes: {100 * rate:.1f} % right,") for line in lines
    )
    again = probability_lines({**report, "second_look": report["unfitted"]})
    assert any(line.startswith("  after a second look: ") for line in again)
    nothing = {**report, "coverage": {**report["coverage"], "threshold": None, "value": 0.0}}
    assert "  no share of the images can be answered with 95 % of the answers right" in probability_lines(nothing)


def test_the_diagrams_are_drawn_and_the_same_figures_give_the_same_bytes(report, tmp_path):
    for name in ("one.png", "two.png"):
        draw_calibration(report, "digits $x^2", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert np.asarray(Image.open(tmp_path / "one.png")).std() > 10, "an empty picture"
