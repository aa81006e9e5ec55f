"""The command on folders in every state."""

import json
import shutil
from pathlib import Path

import pytest

from rft_cluster.report.__main__ import main
from tests.unit.report.whole import written
from tests.unit.run.begun import begun

RECORDS = ("config.yaml", "manifest.json", "parts.jsonl", "thumbnails.zip", "log.txt", "rollouts", "evaluations",
           "eval.jsonl", "metrics.jsonl")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "elsewhere" / "copy"))


def page_of(run: Path, *options: str) -> str:
    assert main([str(run), *options]) == 0
    return (run / "report.html").read_text()


def test_the_page_of_a_copied_run_with_its_proof(copied):
    page = page_of(copied)
    assert "After 2 steps" in page and "Nothing was lost." not in page and "generator died" in page
    assert "Not proved" in page, "it has neither a model nor a journal"
    assert "shown without a picture" not in page
    assert "Which flower?" in page and "Not recorded: an older version" not in page


def test_a_question_that_lists_the_classes_is_said_to_do_so_in_drawn_orders(copied):
    said = "each training prompt lists the classes in another order"
    assert said not in page_of(copied)
    (part,) = map(json.loads, (copied / "parts.jsonl").read_text().splitlines())
    (copied / "parts.jsonl").write_text(json.dumps({**part, "template": "{{ classes }}"}) + "\n")
    assert said in page_of(copied)


def test_a_run_that_has_just_begun(tmp_path):
    page = page_of(begun(tmp_path), "--quick")
    empty = (
        "No evaluation is recorded yet",
        "No rollouts are recorded yet",
        "No step is recorded yet",
        "Not checked here",
    )
    assert [said for said in empty if said not in page] == []


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_whatever_is_gone_or_damaged_the_rest_is_shown(copied, name, how):
    """As in a run of an older version, or a copy that is not whole."""
    paths = [copied / name] if (copied / name).is_file() else sorted((copied / name).iterdir())
    for path in paths:
        path.unlink()
        if how == "damaged":
            path.write_bytes(b'{"step": 1, "split": "test", "completions": [3], "machine": [], "split\x00\n{}\n')
    page = page_of(copied, "--quick")
    assert "<h1>copy</h1>" in page


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("eval.jsonl", '{"step": 2, "split": "test", "accuracy_strict": 0.5}'),
        ("eval.jsonl", '{"step": 2, "split": "test", "accuracy_strict": 0.5, "interval": [0.4, 0.6]}'),
        ("eval.jsonl", '{"step": 2, "split": "test"}'),
        ("parts.jsonl", '{"step": 1, "machine": {}, "versions": 3}'),
    ],
)
def test_a_row_that_lacks_figures_or_has_another_kind_is_passed_over(copied, name, line):
    (copied / "baselines.json").write_text('{"nearest_neighbour": 0.5}')
    with (copied / name).open("a") as file:
        file.write(f"{line}\n")
    assert "<h1>copy</h1>" in page_of(copied, "--quick")


def test_a_file_that_would_be_too_large_shows_fewer_steps(copied, monkeypatch):
    assert "of 2 steps are here" not in page_of(copied, "--quick")
    monkeypatch.setattr("rft_cluster.report.__main__.MOST_FILE", 1000)
    assert "4 completions of 1 of 2 steps are here" in page_of(copied, "--quick")


def test_a_file_elsewhere_and_a_folder_that_cannot_be_written(copied, tmp_path, capsys):
    assert main([str(copied), "--quick", "--output", str(tmp_path / "mine.html")]) == 0
    assert f"written: {tmp_path / 'mine.html'}" in capsys.readouterr().out
    assert not (copied / "report.html").exists()
    assert main([str(copied), "--quick", "--output", "/proc/mine.html"]) == 2
    assert "Set --output to a file in a folder that can be" in capsys.readouterr().err
