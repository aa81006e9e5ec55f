"""The images of `benchmarks.forgetting`, and its table, from made-up records."""

import hashlib
from pathlib import Path

import pytest

from benchmarks import forgetting
from rft_cluster.classification.report import Judged
from rft_cluster.config import load_config
from rft_cluster.run.answers import write_answers


def judged(*right: bool) -> list[Judged]:
    return [
        Judged(example_id=str(place), label="one", text="", predicted="one", strict=one, lenient=one, formatted=True)
        for place, one in enumerate(right)
    ]


def test_no_scan_is_in_both_sets(tmp_path):
    forgetting.write_digits(tmp_path / "known", tmp_path / "other")
    known, other = ({file.name: file for file in (tmp_path / name).rglob("*.png")} for name in ("known", "other"))
    assert len(known) == 899 and len(other) == 898 and not known.keys() & other.keys()
    digests = [hashlib.sha256(file.read_bytes()).digest() for files in (known, other) for file in files.values()]
    assert len(set(digests)) > 1790, "scikit-learn's own few twins aside"


def test_each_training_is_a_configuration():
    for more in ([], forgetting.AGAIN):
        assert load_config("digits", [*forgetting.SAME, *more]).schedule.steps == forgetting.STEPS


def test_rates_are_before_and_after_of_either_training(tmp_path):
    """By hand, of four new images and two known ones."""
    start: Path = tmp_path / "second"
    inside = start / forgetting.WAYS["SFT"]
    inside.mkdir(parents=True)
    write_answers(start, 0, "test", judged(False, False, False, True))
    write_answers(start, 0, "also", judged(True, True))
    write_answers(inside, forgetting.STEPS, "test", judged(True, True, True, False))
    write_answers(inside, forgetting.STEPS, "also", judged(True, False))
    found = forgetting.rates(start, inside)
    assert found == {
        "new": {"n": 4, "before": 0.25, "after": 0.75},
        "known": {"n": 2, "before": 1.0, "after": 0.5},
    }
    record = {"seed": 41, "ways": dict.fromkeys(forgetting.WAYS, found)}
    of_grpo, _ = forgetting.forgotten_table([record]).splitlines()[2:]
    cells = ["GRPO", "25.0", "75.0", "+50.0 (+50.0 to +50.0)", "1", "100.0", "50.0", "-50.0 (-50.0 to -50.0)", "1", "1"]
    assert of_grpo == f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("change", [{"tiny": 0}, {"asked": []}])
def test_what_was_measured_otherwise_is_due_again(monkeypatch, change):
    own = {"seed": 41, "tiny": forgetting.RECIPE_VERSION, "asked": forgetting.ASKED}
    monkeypatch.setattr(forgetting, "read_result", lambda _: {"runs": [own, own | {"seed": 42} | change]})
    assert [one["seed"] for one in forgetting.records()] == [41]
