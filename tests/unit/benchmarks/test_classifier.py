"""Which runs of `benchmarks.classifier` are due, and its tables, from made-up records."""

import json
import shutil

import pytest

from benchmarks import classifier
from benchmarks.classifier import POLICIES, SEEDS, asked, asked_table, calibration_table, due, looks_table, pages
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.model.tiny.conditions import RECIPE_VERSION


def record(policy: str, seed: int, right: int, second: int) -> dict:
    """A policy that answered `right` of 100 images greedily, and `second` at each second look."""
    figures = {"accuracy": right / 100, "log_loss": 0.5, "calibration_error": 0.25}
    look = {"strict": {"rate": second / 100}, "in_options": {"rate": 1.0}}
    return {
        "policy": policy,
        "seed": seed,
        "asked": asked(policy),
        "tiny": RECIPE_VERSION,
        "n": 100,
        "greedy": right / 100,
        "vote": (right - 2) / 100,
        "parts": {"seen": 0.9, "unseen": 0.0},
        "orders": {
            "mean": right / 100,
            "same": 0.99,
            "first": {"answers": 0.12, "images": 0.1},
            "last": {"answers": 0.1, "images": 0.1},
        },
        "probabilities": {
            "temperature": 0.5,
            "coverage": 0.75,
            "unfitted": figures,
            "fitted": figures | {"calibration_error": 0.05},
            "votes": None,
            "methods": {name: {"accuracy": 0.9, "log_loss": 0.3} for name in ("joint", "per_token", "grey")},
        },
        "baselines": {"base": 0.1, "sft": 0.88, "tower_probe": 0.93},
        "looks": {str(look_): look for look_ in POLICIES[policy].looks if look_},
    }


RUNS = [record("closed", seed, right, right + 1) for seed, right in zip(SEEDS, (90, 92, 91, 95, 94), strict=True)]


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_is_a_configuration(name):
    assert load_config("digits", [*POLICIES[name].overrides, "run.seed=41"]).run.seed == 41
    assert "," not in name, "--policies is separated by commas"


def test_what_was_measured_otherwise_is_due_again(monkeypatch):
    kept = [record("closed", 41, 90, 90), record("closed", 42, 90, 90) | {"tiny": RECIPE_VERSION - 1}]
    kept += [record("closed", 43, 90, 90) | {"asked": []}, record("closed", 44, 90, 90) | {"policy": "of yesterday"}]
    monkeypatch.setattr(classifier, "read_result", lambda name: {"runs": json.loads(json.dumps(kept))})
    assert due(["closed"], SEEDS) == [("closed", 42), ("closed", 43), ("closed", 44), ("closed", 45)]
    assert due(["thinks", "closed"], [41, 42]) == [("thinks", 41), ("thinks", 42), ("closed", 42)]


def test_a_kept_record_takes_its_place_among_those_of_others(monkeypatch, tmp_path):
    kept = {"runs": [record("closed", 42, 90, 90), record("closed", 41, 80, 80)]}
    monkeypatch.setattr(classifier, "FOLDER", tmp_path)
    monkeypatch.setattr(classifier, "read_result", lambda name: json.loads(json.dumps(kept)))
    monkeypatch.setattr(classifier, "write_result", lambda name, result: kept.update(result))
    classifier.keep(record("thinks", 45, 70, 70))
    classifier.keep(record("closed", 41, 85, 85))
    assert [(one["policy"], one["seed"], one["greedy"]) for one in kept["runs"]] == [
        ("thinks", 45, 0.7),
        ("closed", 41, 0.85),
        ("closed", 42, 0.9),
    ]


def test_a_record_has_the_figures_of_an_evaluation_that_its_tables_need():
    def rate(value: float) -> dict:
        return {"right": 1, "n": 100, "rate": value, "interval": [0, 1]}

    def figures(error: float) -> dict:
        return {
            "accuracy": rate(0.9),
            **{name: {"value": error, "interval": [0, 1]} for name in ("log_loss", "calibration_error")},
        }

    place = {"answers": 0.12, "images": 0.1}
    found = {
        "images": 100,
        "greedy": {"strict": rate(0.9), "lenient": rate(0.95)},
        "vote": {"strict": rate(0.8)},
        "seen": rate(0.95),
        "unseen": rate(0.25),
        "orders": {"orders": [["b", "a"]], "strict": [0.9], "mean": 0.9, "same": 0.5, "first": place, "last": place},
        "second_look": {"asked": 3, "strict": rate(0.85), "in_options": rate(0.97)},
        "probabilities": {
            **figures(0.05),
            "temperature": 0.5,
            "unfitted": figures(0.25),
            "coverage": {"value": 0.75, "interval": [0, 1]},
            "methods": {name: {"accuracy": 0.9, "log_loss": 0.3} for name in ("joint", "per_token", "grey")},
        },
        "baselines": {"sft": 0.88},
    }
    made = classifier.figures_of(found)
    look = made.pop("look")
    one = {"policy": "closed", "seed": 41, **made, "looks": {str(number): look for number in POLICIES["closed"].looks}}
    assert "| closed | 2 | 90.0 | 85.0 | -5.0 (-5.0 to -5.0) | 1 | 97.0 | 1 |" in looks_table([one])
    assert "| 95.0 | 25.0 | 1 |" in classifier.unseen_table([one | {"policy": "closed without eight and nine"}])
    assert "| 90.0 | 90.0 | 50.0 | 2.0 | 2.0 | 1 |" in classifier.orders_table([one])
    assert "| closed | 90.0 | 80.0 | -10.0 (-10.0 to -10.0) | 1 | 1 |" in classifier.votes_table([one])
    unfitted, fitted = calibration_table([one]).splitlines()[2:]
    assert unfitted == "| closed | 1 | 90.0 | 25.0 | 0.25 |  | 1 |"
    assert fitted == "| closed | 0.50 | 90.0 | 5.0 | 0.05 | 75.0 | 1 |"


def test_tables_have_medians_ranges_and_the_exact_test():
    five, *_ = looks_table(RUNS).splitlines()[2:][::-1]
    points = "+1.0 (+1.0 to +1.0) | 0.062"  # five equal signs: 2 / 2^5
    assert five == f"| closed | 5 | 92.0 (90.0 to 95.0) | 93.0 (91.0 to 96.0) | {points} | 100.0 (100.0 to 100.0) | 5 |"
    unfitted, fitted = calibration_table(RUNS).splitlines()[2:]
    assert unfitted.startswith("| closed | 1 | 92.0 (90.0 to 95.0) | 25.0 (25.0 to 25.0) | 0.50 (0.50 to 0.50) |  |")
    assert "| 0.50 (0.50 to 0.50) |" in fitted and "| 5.0 (5.0 to 5.0) |" in fitted and "| 75.0 (" in fitted
    thinks = [record("thinks", 41, 90, 80), record("thinks", 42, 86, 80)]
    lines = asked_table(thinks).splitlines()[2:]
    assert lines[0] == "| **the policy** | 88.0 (86.0 to 90.0) |  |  | 2 |"
    assert lines[1] == "| the untouched model | 10.0 (10.0 to 10.0) | +78.0 (+76.0 to +80.0) | 0.5 | 2 |"
    assert lines[2] == "| supervised fine-tuning | 88.0 (88.0 to 88.0) | +0.0 (-2.0 to +2.0) | 1 | 2 |"
    assert len(lines) == 3, "what was not measured has no line"


def test_each_table_has_its_place_in_a_page(monkeypatch, tmp_path):
    for name in ("PREDICT", "EVALUATE", "BASELINES"):
        page = getattr(classifier, name)
        shutil.copy(page, tmp_path)
        monkeypatch.setattr(classifier, name, tmp_path / page.name)
    texts = [text for page in pages([]).values() for text in page.values()]
    assert set(texts) == {"Not measured."} and len(texts) == 7
    everything = [record(name, seed, 90, 90) for name in POLICIES for seed in SEEDS]
    assert "Not measured." not in [text for page in pages(everything).values() for text in page.values()]
    classifier.write_pages(everything)
    assert "| closed without eight and nine |" not in (tmp_path / "predict.md").read_text(), "no second look was asked"
    classifier.write_pages([])
    assert (tmp_path / "predict.md").read_text().count("Not measured.") == 3


def test_an_unknown_policy_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"closd is none of .*closed"):
        classifier.work(["closd"], SEEDS)
