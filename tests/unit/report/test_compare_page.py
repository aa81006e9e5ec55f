"""Runs side by side; a difference is taken by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chromium import Chromium, find_chromium
from rft_cluster.classification.intervals import paired_difference
from rft_cluster.classification.report import Judged
from rft_cluster.common.files import write_json
from rft_cluster.report.__main__ import main
from rft_cluster.report.compare import compare
from rft_cluster.run.answers import read_answers, write_answers
from rft_cluster.run.history import read_history
from tests.unit.report.test_hints import run_folder
from tests.unit.report.test_in_browser import HOSTILE, visible
from tests.unit.report.whole import written

IMAGES = 8


def with_answers(
    run: Path, right: set[int], first: int = 0, label: str = "rose", split: str = "test", sha: str = ""
) -> Path:
    """Give a run `IMAGES` images from number `first` in its last evaluation, those in `right` answered rightly."""
    numbers = range(first, first + IMAGES)
    entries = [{"id": f"{number}.png", "sha256": f"{sha}{number}".rjust(64, "0"), "label": label} for number in numbers]
    manifest = {"name": "photos", "seed": 0, "classes": ["rose", "tulip"], "aliases": {}, "skipped": {}, "copies": {}}
    shots = [{"id": "shot.png", "sha256": "e" * 64, "label": label}]
    splits = {"train": shots, "validation": [], "test": [], split: entries}
    write_json(run / "manifest.json", {"format": 2, **manifest, "splits": splits})
    judged = [Judged(f"{n}.png", label, "", label, n in right, n in right, True) for n in numbers]
    write_answers(run, 80, split, judged)
    return run


def two(folder: Path, first: dict, second: dict) -> dict:
    """The difference of two runs."""
    runs = [with_answers(run_folder(folder / name), **own) for name, own in (("a", first), ("b", second))]
    (found,) = compare([read_history(run) for run in runs]).context["differences"]
    return found


def test_a_difference_is_of_each_image_that_both_were_tested_on(tmp_path):
    found = two(tmp_path, {"right": {0, 1, 2, 3, 4}}, {"right": {4, 5, 6, 7, 8, 9}, "first": 2})
    # in both: 2 to 7. Right in the first: 2, 3, 4; in the second: 4, 5, 6, 7.
    by_hand = paired_difference([True, True, True, False, False, False], [False, False, True, True, True, True])
    assert {name: found[name] for name in by_hand} == by_hand
    assert (found["only_first"], found["only_second"], found["n"], found["images"]) == (2, 3, 6, [8, 8])
    assert found["difference"] == pytest.approx(1 / 6) and found["problem"] == ""


def test_seen_and_unseen_classes_are_shown_apart(tmp_path):
    run = with_answers(run_folder(tmp_path / "a"), {0, 1, 2})
    manifest = json.loads((run / "manifest.json").read_text())
    labels = ["rose"] * 3 + ["tulip"] * 5  # the only shot is a rose
    for entry, label in zip(manifest["splits"]["test"], labels, strict=True):
        entry["label"] = label
    write_json(run / "manifest.json", manifest)
    judged = read_answers(run, 80, "test")
    write_answers(run, 80, "test", [replace(one, label=label) for one, label in zip(judged, labels, strict=True)])
    whole, seen, unseen = compare([read_history(run)]).context["accuracies"]
    assert whole["name"] == "mine" and (seen["name"], seen["rate"], seen["n"]) == ("mine, seen classes", 1.0, 3)
    assert (unseen["name"], unseen["rate"], unseen["n"]) == ("mine, unseen classes", 0.0, 5)
    (row,) = compare([read_history(run)]).context["rows"]
    assert row["of_seen"]


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ({"right": {0}, "first": 100}, "no image is in both, with the same label"),
        ({"right": {0}, "sha": "f"}, "no image is in both, with the same label"),
        ({"right": {0}, "label": "tulip"}, "no image is in both, with the same label"),
    ],
)
def test_other_images_are_not_compared(tmp_path, second, problem):
    assert two(tmp_path, {"right": {0}}, second)["problem"] == problem


def test_runs_without_recorded_answers_and_of_other_splits_are_not_compared(tmp_path):
    runs = [with_answers(run_folder(tmp_path / name), {1}) for name in "abc"]
    (runs[1] / "evaluations" / "step-000080-test.jsonl").unlink()
    rows = [line for line in (runs[2] / "eval.jsonl").read_text().splitlines(True) if '"test"' not in line]
    (runs[2] / "eval.jsonl").write_text("".join(rows))
    with_answers(runs[2], {1}, split="validation")
    found = {(row["first"], row["second"]): row["problem"] for row in _differences(runs)}
    old = str(runs[1])
    assert found == {
        (str(runs[0]), old): f"no answers to compare are recorded of {old}",
        (str(runs[0]), str(runs[2])): "one has test images, the other validation images",
        (old, str(runs[2])): f"no answers to compare are recorded of {old}",
    }


def _differences(runs: list[Path]) -> list[dict]:
    return compare([read_history(run) for run in runs]).context["differences"]


@pytest.mark.parametrize(("runs", "pairs"), [(2, 1), (6, 15), (7, 6)])
def test_of_many_runs_each_is_compared_with_the_first(tmp_path, runs, pairs):
    made = [with_answers(run_folder(tmp_path / str(number), steps=1), {number}) for number in range(runs)]
    assert len(_differences(made)) == pairs


def test_settings_that_differ_curves_and_what_stands_out(tmp_path):
    kl = {"figures": {"kl": 2.0}}
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", steps=60, **kl)]
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.0005", "learning_rate: 0.001"))
    page = compare([read_history(run) for run in runs])
    assert page.context["settings"] == [{"key": "optimizer.learning_rate", "values": ["0.0005", "0.001"]}]
    first, second = page.context["rows"]
    assert (first["steps"], first["before"], first["after"], first["baseline"]) == (80, 0.5, 0.86, 0.8)
    assert first["hints"] == [] and second["hints"][0].startswith("The KL from the starting model is 2.0")
    curves = page.data["curves"]
    assert curves["step"] == list(range(81))
    charts = {chart["title"]: chart["series"] for chart in curves["charts"]}
    assert [one["values"][80] for one in charts["Accuracy, validation"]] == [86.0, 86.0]
    assert [one["values"][30] for one in charts["KL from the start"]] == [0.3, 2.0]
    assert [one["values"][70] for one in charts["KL from the start"]] == [0.3, None]


def test_the_command_and_what_is_wrong_with_its_words(tmp_path, capsys, monkeypatch):
    runs = [str(with_answers(run_folder(tmp_path / name / "runs"), {1})) for name in "ab"]
    assert main(["--compare", *runs]) == 0
    assert (tmp_path / "compare.html").is_file()
    assert main(["--compare", *runs, "--output", str(tmp_path / "other.html")]) == 0
    assert "other.html; open it in a browser" in capsys.readouterr().out
    shutil.copytree(runs[0], tmp_path / "sweep" / "first")
    shutil.copytree(runs[1], tmp_path / "sweep" / "second")
    assert main(["--compare", str(tmp_path / "sweep")]) == 0
    assert "second" in (tmp_path / "sweep" / "compare.html").read_text()
    for words, told in (
        ([runs[0]], "--compare needs two runs or more, each once"),
        ([runs[0], f"{runs[0]}/../mine"], "--compare needs two runs or more, each once"),
        ([str(tmp_path / "a" / "runs")], "--compare needs two runs or more, each once"),
        ([runs[0], str(tmp_path)], "is not the folder of a run"),
    ):
        assert main(["--compare", *words]) == 2
        assert told in capsys.readouterr().err
    for words in ([runs[0], "--compare", *runs], []):
        with pytest.raises(SystemExit, match="2"):
            main(words)


@pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine")
def test_hostile_names_stay_text_in_a_browser(tmp_path):
    runs = [str(written(tmp_path / str(number), HOSTILE, name=f"<b>{number}<!--")) for number in range(2)]
    assert main(["--compare", *runs, "--output", str(tmp_path / "c.html")]) == 0
    with Chromium() as browser:
        browser.open(tmp_path / "c.html")
        assert browser.messages == [] and browser.run("window.struck ?? 'safe'") == "safe"
        assert "<b>0<!--" in visible(browser)
        browser.wait_for("document.querySelectorAll('main .charts canvas').length > 3")  # drawn once they have a width


def test_after_are_the_figures_of_a_trained_policy(tmp_path):
    """A run that goes on, or was stopped, has tested the untrained policy alone."""
    run = run_folder(tmp_path / "a")
    rows = [{"step": step, "split": split, "accuracy_strict": rate, "n": IMAGES, "format_rate": 1.0}
            for step, split, rate in ((0, "test", 0.1), (20, "validation", 0.7), (40, "validation", 0.85))]  # fmt: skip
    for known, before, after in ((1, 0.1, None), (2, None, 0.7), (3, None, 0.85)):
        history = replace(read_history(run), evaluations=tuple(rows[:known]))
        (row,) = compare([history]).context["rows"]
        assert (row["before"], row["after"]) == (before, after)
