"""How a run records its baselines, and how `evaluate` compares with them, without actors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rft_cluster import comparison, evaluate
from rft_cluster.classification import baselines
from rft_cluster.classification.baselines import BASELINES, compared
from rft_cluster.cluster import tower
from rft_cluster.common.files import FORMAT, write_json
from rft_cluster.data.manifest import manifest
from rft_cluster.prompts import Question
from rft_cluster.run.history import read_history
from rft_cluster.run.task import Task
from tests.unit.report.whole import SETTINGS, dataset, written
from tests.unit.run.begun import config

DATA = dataset("")
COMMAND = ["launch", "--config", "mine", "--resume"]
TASK = Task(DATA, Question("Which flower?"))
FEATURES = {sha256: np.array([number % 2, 1.0]) for number, sha256 in enumerate(compared(DATA))}


@pytest.fixture
def done(tmp_path, monkeypatch, capsys) -> Path:
    """A run's folder after its comparison: right on all test images, and on half of them before."""
    run = written(tmp_path)
    asked = []
    monkeypatch.setattr(comparison, "features_of", lambda *arguments: (asked.append(arguments), (FEATURES, ""))[1])
    settings = config(tmp_path, *SETTINGS)
    comparison.compare(settings, TASK, "started/from", COMMAND)
    assert [(path, images) for _, path, images in asked] == [("started/from", compared(DATA))]
    return run


def test_a_run_records_its_baselines_and_the_verdict(done, capsys):
    said = capsys.readouterr().out
    record = json.loads((done / "baselines.json").read_text())
    assert list(record) == [*BASELINES, "right"] and {len(flags) for flags in record["right"].values()} == {4}
    assert record["tower_probe"] == 1.0  # the features tell the colours' classes
    assert "linear probe on vision features of the same 2 images: test accuracy 100.0 %" in said
    assert "is not clearly better than the best baseline" in said and "+50.0 points" in said
    history = read_history(done)
    assert list(history.baselines) == list(BASELINES) == list(history.right)
    assert history.answered_right(2) == [True] * 4 and history.answered_right(1) == []


def test_without_a_tower_the_reason_is_said_and_recorded(tmp_path, monkeypatch, capsys):
    run = written(tmp_path)
    monkeypatch.setattr(comparison, "features_of", lambda *_: (None, "it is gone"))
    comparison.compare(config(tmp_path, *SETTINGS), TASK, "gone", COMMAND)
    assert "no baselines on vision features: it is gone" in capsys.readouterr().out
    record = json.loads((run / "baselines.json").read_text())
    assert list(record) == ["nearest_neighbour", "logistic_regression", "rbf_svm", "right", "skipped"]


def test_an_export_is_compared_with_what_its_run_recorded(done, tmp_path):
    figures = evaluate._compared(config(tmp_path, *SETTINGS), TASK, "", done / "model", [True, True, False, True])
    assert figures["baselines"] == read_history(done).baselines and "baselines_skipped" not in figures
    assert figures["greedy_minus_baselines"]["tower_probe"]["difference"] == -0.25
    assert "+25.0 points" in figures["verdict"]  # over the untrained model


@pytest.mark.parametrize("how", ["other images", "other shots", "no record", "no run"])
def test_what_was_recorded_of_other_images_or_not_at_all_is_not_taken(how, done, tmp_path):
    task, export = TASK, done / "model"
    match how:
        case "other images":
            task = Task(dataset("other"), TASK.question)
        case "other shots":
            task = Task(replace(DATA, train=[DATA.test[0], DATA.train[1]]), TASK.question)
        case "no record":
            (done / "baselines.json").unlink()
        case "no run":
            export = tmp_path / "elsewhere" / "model"
    figures = evaluate._compared(config(tmp_path, *SETTINGS), task, "", export, [True] * 4)
    assert list(figures["baselines"]) == ["nearest_neighbour", "logistic_regression", "rbf_svm"]
    assert ("no run is recorded" in figures["baselines_skipped"]) == (how != "no record")


def test_the_base_model_looks_for_itself_and_has_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(tower, "features_of", lambda *_: (FEATURES, ""))
    figures = evaluate._compared(config(tmp_path, *SETTINGS), TASK, "base/model", None, [True] * 4)
    assert list(figures) == ["baselines", "greedy_minus_baselines"] and list(figures["baselines"]) == list(BASELINES)


@pytest.mark.parametrize("command", ["launch", "evaluate"])
def test_unseen_classes_are_told_apart_and_are_not_the_baselines_business(command, tmp_path, monkeypatch, capsys):
    """Of the run's two classes the second is not trained: two of the four test images are of either."""
    run, part = written(tmp_path), replace(DATA, train=DATA.train[:1])
    unseen = part.unseen
    write_json(run / "manifest.json", {"format": FORMAT, **manifest(part, 0)})
    for module in (baselines, evaluate):
        monkeypatch.setattr(module, "on_pixels", lambda _: {"nearest_neighbour": (True, False)})
    monkeypatch.setattr(baselines, "on_features", lambda *_: {"tower_probe": (True, True)})
    monkeypatch.setattr(comparison, "features_of", lambda *_: (FEATURES, ""))
    settings, task = config(tmp_path, *SETTINGS), Task(part, TASK.question)
    comparison.compare(settings, task, "started/from", COMMAND)
    said = capsys.readouterr().out
    history = read_history(run)
    assert history.unseen == unseen and history.right["tower_probe"] == (True, True)
    assert history.answered_right(0) == [True, True] and len(history.tested(0)) == 4
    if command == "launch":
        assert "seen classes: test accuracy 100.0 % (34.2 to 100.0, 2 images), +0.0 points" in said
        assert "unseen classes: test accuracy 100.0 % (34.2 to 100.0, 2 images), +100.0 points" in said
    else:
        figures = evaluate._compared(settings, task, "", run / "model", [True, True])
        assert figures["greedy_minus_baselines"]["tower_probe"]["n"] == 2 and "+0.0 points" in figures["verdict"]
