"""What the page says of probabilities, from files that a stranger may have written."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rft_cluster.classification.calibration import calibration_figures
from rft_cluster.report.__main__ import SCRIPTS
from rft_cluster.report.calibration import probabilities_of, why_not_calibrated
from rft_cluster.report.collect import collect
from rft_cluster.report.page import render
from rft_cluster.run.history import read_history
from tests.unit.report.whole import written

SURE = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
FIGURES = calibration_figures(SURE, np.array([0, 0, 1, 0]))
FITTED = {"models": {"model": {"steps": 2, "temperature": 1.5, "images": 4, "unfitted": FIGURES, "fitted": FIGURES}}}
TESTED = {"probabilities": {**FIGURES, "temperature": None, "methods": {}, "fitted_on": None}}


def put(run: Path, calibration: object = None, evaluation: object = None) -> Path:
    for file, value in (("calibration.json", calibration), ("evaluation-test/evaluation.json", evaluation)):
        if value is not None:
            (run / file).parent.mkdir(exist_ok=True, parents=True)
            (run / file).write_text(value if isinstance(value, str) else json.dumps(value))
    return run


def page_of(run: Path) -> str:
    made = collect(read_history(run), {}, "", None)
    return render("report.html", made.context, made.data, SCRIPTS)


def test_the_test_s_figures_are_shown_before_those_of_the_validation(tmp_path):
    shown = probabilities_of(put(tmp_path, FITTED, TESTED), [])
    assert (shown["split"], shown["temperature"], shown["unfitted"]) == ("test", None, None)
    shown = probabilities_of(put(tmp_path / "other", FITTED), [])
    assert shown["split"].startswith("validation") and shown["temperature"] == 1.5
    assert shown["points"][-1] == (100.0, 75.0) and shown["least"] == 75.0
    assert probabilities_of(tmp_path / "none", []) is None
    strange = {"probabilities": {**TESTED["probabilities"], "unfitted": FIGURES}}  # with no temperature
    assert probabilities_of(put(tmp_path / "strange", FITTED, strange), [])["unfitted"] is None


@pytest.mark.parametrize(("trained", "split"), [(2, "test"), (4, "validation, on which the temperature was fitted")])
def test_an_evaluation_before_more_steps_is_not_the_last_policy_s(tmp_path, monkeypatch, trained, split):
    monkeypatch.setattr("rft_cluster.report.calibration.exported", lambda _: SimpleNamespace(steps=trained))
    run = put(tmp_path, FITTED, {**TESTED, "steps": 2})
    assert probabilities_of(run, [])["split"] == split


def test_the_page_has_both_diagrams(tmp_path):
    run = put(written(tmp_path), FITTED)
    page = page_of(run)
    assert page.count("<circle") == len(FIGURES["reliability"]) and "<polyline" in page
    assert "without the temperature of 1.5" in page and "75 %" in page
    nothing = page_of(put(written(tmp_path / "other"), {"skipped": "<b>no room"}))
    assert "Not calibrated: &lt;b&gt;no room." in nothing and "<polyline" not in nothing


def changed(**figures: object) -> dict:
    return {"probabilities": {**TESTED["probabilities"], **figures}}


@pytest.mark.parametrize(
    "evaluation",
    [
        changed(reliability=[{"confidence": 1e9, "rate": 0.5, "n": 1, "interval": [0, 1]}]),
        changed(reliability=[{"confidence": "<script>", "rate": 0.5, "n": 1, "interval": [0, 1]}]),
        changed(reliability=FIGURES["reliability"] * 1000),
        changed(curve={"coverage": [0.5] * 5000, "accuracy": [0.5] * 5000}),
        changed(log_loss={"value": "NaN", "interval": [0, 1]}),
        {"probabilities": "many"},
        "{not json",
    ],
)
def test_what_is_damaged_is_said_and_the_page_is_made_without_it(tmp_path, evaluation):
    run, problems = put(written(tmp_path), None, evaluation), list[str]()
    assert probabilities_of(run, problems) is None and "damaged" in problems[0]
    assert "<polyline" not in page_of(run)


def test_a_link_in_a_stranger_s_run_is_not_followed(tmp_path):
    run = written(tmp_path)
    put(tmp_path / "elsewhere", FITTED, TESTED)
    os.symlink(tmp_path / "elsewhere" / "calibration.json", run / "calibration.json")
    os.symlink(tmp_path / "elsewhere" / "evaluation-test", run / "evaluation-test")
    assert probabilities_of(run, []) is None and why_not_calibrated(run) == ""
