import csv
import io
import json

import pytest

from rft_cluster.classification.answers import Vote
from rft_cluster.classification.predictions import (
    COLUMNS,
    COLUMNS_OF_P,
    Prediction,
    json_line,
    summary_line,
    table_line,
    text_line,
)
from rft_cluster.classification.probabilities import Answer
from rft_cluster.classification.second_look import Again

VOTE = Vote("rose", 0.75, {"rose": 6}, "red\x1b[2J\nthorns")
ANSWER = Answer({"tulip": 0.6, "rose": 0.3, "a\x1b": 0.06, "b": 0.03, "c": 0.007, "d": 0.003}, named=0.98)
TOP = "tulip 60.0 %, rose 30.0 %, a? 6.0 %, b 3.0 %, c 0.7 %"


@pytest.mark.parametrize(("votes", "how"), [(8, "75 %"), (None, "greedy")])
def test_a_line_for_people_and_one_for_programs(votes, how):
    one = Prediction("a b.png", VOTE, votes=votes)
    assert text_line(one) == f"a b.png\trose\t{how}\tred?[2J thorns"
    assert json.loads(json_line(one)) == {
        "file": "a b.png", "label": "rose", "share": 0.75, "counts": {"rose": 6}, "reasoning": "red\x1b[2J\nthorns",
    }  # fmt: skip


@pytest.mark.parametrize(("below", "label"), [(0.6, "tulip"), (0.61, "unsure")])
def test_the_five_most_probable_classes_are_shown_and_all_are_in_json(below, label):
    one = Prediction("a.png", None, ANSWER, unsure_below=below, calibrated=True)
    assert text_line(one) == f"a.png\t{label}\t60.0 %\t{TOP}"
    record = json.loads(json_line(one))
    assert record == {
        "file": "a.png", "label": "tulip", "probability": 0.6, "probabilities": dict(ANSWER.probabilities),
        "named": 0.98, "unsure": label == "unsure", "calibrated": True,
    }  # fmt: skip
    assert table_line(one) == f"a.png,{label},0.6,rose,"


def test_reasoning_and_probabilities_stand_together():
    one = Prediction("a.png", VOTE, ANSWER, votes=8)
    assert text_line(one) == f"a.png\ttulip\t60.0 %\t{TOP}\tred?[2J thorns"
    record = json.loads(json_line(one))
    assert (record["label"], record["counts"], record["reasoning"]) == ("tulip", {"rose": 6}, VOTE.reasoning)


@pytest.mark.parametrize(("label", "share"), [("tulip", 0.25), ("rose", 0.625), (None, 0.0)])
def test_the_answer_to_a_second_look_has_its_own_reasoning_and_share(label, share):
    vote = Vote("rose", 0.625, {"rose": 5, "tulip": 2}, "red")
    one = Prediction("a.png", vote, votes=8, again=Again(("rose", "tulip"), label, reasoning="six\tpetals"))
    assert text_line(one) == f"a.png\t{label or '(no class)'}\tsecond look at 2\tsix petals"
    assert table_line(one) == f"a.png,{label or ''},{share},six petals"
    assert json.loads(json_line(one)) == {
        "file": "a.png", "label": label, "share": share, "counts": vote.counts, "reasoning": "six\tpetals",
        "options": ["rose", "tulip"],
    }  # fmt: skip


@pytest.mark.parametrize("path", ["a.png", "=1+1.png", "a, b.png", 'a "b".png', "薔薇.png", "a\nb.png"])
@pytest.mark.parametrize("label", ["rose", "=SUM(A1)", "-1", "5 mm, new", None])
def test_a_row_for_spreadsheets(path, label):
    written = Prediction(path, Vote(label, 1 / 3, {}, "red,\nthorns"), votes=8)
    probable = Prediction(path, written.vote, Answer({label or "": 2 / 3, "=2": 1 / 3}, 1.0))
    for one, columns, figures in ((written, COLUMNS, ["0.3333"]), (probable, COLUMNS_OF_P, ["0.6667", "'=2"])):
        (row,) = csv.reader(io.StringIO(table_line(one)))
        assert len(row) == len(columns)
        assert row[2:] == [*figures, "red, thorns"]
        for cell, value in zip(row, (path, label or ""), strict=False):
            assert cell in (value, f"'{value}")
            assert not cell.startswith(("=", "-", "+", "@"))


@pytest.mark.parametrize(
    ("labels", "unreadable", "text"),
    [
        ({"bag": 41, "shoe": 38, "(no class)": 2}, 0, "81 images: 41 bag, 38 shoe, 2 (no class)"),
        ({"a": 1, "b": 1}, 3, "2 images: 1 a, 1 b; 3 not classified"),
        ({}, 2, "0 images; 2 not classified"),
        ({f"c{n:02d}": 1 for n in range(30)}, 0, "10 of 10 other classes"),
    ],
)
def test_a_folder_s_summary(labels, unreadable, text):
    assert text in summary_line(labels, unreadable)
