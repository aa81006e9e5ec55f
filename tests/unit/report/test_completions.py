import json
from itertools import pairwise

import pytest

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.report.completions import Columns, chosen_steps, read_columns, steps_that_fit
from rft_cluster.run.history import read_history
from tests.unit.report.whole import written

READER = AnswerReader(["rose", "tulip"], {"rose": ["dog rose"]})


def columns() -> Columns:
    return Columns({"a": 0}, {"rose": 0, "tulip": 1}, READER)


ROW = {
    "prompt_id": "train/0/0",
    "example_id": "a",
    "label": "rose",
    "completions": ["<answer>Dog Rose</answer>", "<answer>oak</answer>"],
    "version_spans": [[[3, 5]], [[3, 2], [4, 6]]],
    "rewards": [
        {"total": 2.0, "parts": {"format": 1.0, "accuracy": 1.0}, "failures": {}},
        {"total": None, "parts": {"format": 0.123456}, "failures": {"accuracy": "no answer"}},
    ],
    "advantages": [0.7, None],
    "tokens": [5, 8],
    "finish_reasons": ["stop", "length"],
    "logprob_gaps": [0.00123456, None],
    "why": ["right", "wrong"],
}


def test_a_group_in_columns():
    made = columns()
    made.add(4, ROW)
    assert made.page() == {
        "groups": {"step": [4], "image": [0], "label": [0], "prompt": ["train/0/0"], "start": [0, 2]},
        "text": ROW["completions"],
        "total": [2.0, None],
        "advantage": [0.7, None],
        "tokens": [5, 8],
        "finish": [1, 0],
        "finishes": ["length", "stop"],
        "gap": [0.001235, None],
        "versions": [3, "3 (2), 4 (6)"],
        "answer": [0, -1],
        "why": ["right", "wrong"],
        "parts": {"format": [1.0, 0.1235], "accuracy": [1.0, None]},
        "failures": {1: "accuracy: no answer"},
    }


def test_an_alias_of_what_is_no_class_answers_none():
    """As in the manifest of a run with `data.only`."""
    made = Columns({}, {"rose": 0}, AnswerReader(["rose"], {"oak": ["an oak"]}))
    made.add(1, {"completions": ["<answer>an oak</answer>", "<answer>rose</answer>"]})
    assert made.page()["answer"] == [-1, 0]


def test_a_record_of_an_older_version_has_fewer_columns():
    made = columns()
    made.add(1, {"completions": ["<answer>rose</answer>"], "rewards": ROW["rewards"][:1]})
    made.add(2, ROW)
    page = made.page()
    assert page["advantage"] == [None, 0.7, None]
    assert page["groups"]["start"] == [0, 1, 3]
    older = columns()
    older.add(1, {"completions": ["x"], "example_id": "new", "label": "oak"})
    assert {"advantage", "tokens", "gap", "why"}.isdisjoint(older.page())
    assert older.page()["groups"]["image"] == [1] and older.page()["groups"]["label"] == [2]


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": "many"},
        {"completions": [None, 7]},
        {"version_spans": [[], [[1]]]},
        {"rewards": [7]},
        {"finish_reasons": [{}, []]},
        {"example_id": None},
    ],
)
def test_a_damaged_group_is_left_out_and_counted(damage):
    made = columns()
    made.add(1, {**ROW, **damage})
    made.add(2, ROW)
    assert made.damaged == 1 and made.page()["groups"]["start"] == [0, 2]


def test_too_few_or_too_many_figures_and_those_that_are_no_number():
    made = columns()
    made.add(1, {**ROW, "rewards": ROW["rewards"][:1], "advantages": [1, 2, 3], "logprob_gaps": [float("nan")]})
    made.add(2, ROW)
    page = made.page()
    assert page["total"] == [2.0, None, 2.0, None] and page["advantage"] == [1, 2, 0.7, None]
    assert page["gap"] == [None, None, 0.001235, None]
    assert page["parts"]["accuracy"] == [1.0, None, 1.0, None]
    json.dumps(page, allow_nan=False)


def test_all_steps_of_a_small_run_and_those_of_a_large_one_that_fit(tmp_path):
    history = read_history(written(tmp_path))
    assert steps_that_fit(history) == [1, 2]
    assert steps_that_fit(history, most=4) == [2]
    assert steps_that_fit(history, most_bytes=1) == [2]
    made = read_columns(history, [1, 2], {}, {"rose": 0, "tulip": 1}, READER).page()
    assert len(made["text"]) == 8 and made["groups"]["step"] == [1, 1, 2, 2]


def test_the_chosen_steps_are_spread_and_show_each_part_of_an_epoch():
    chosen = chosen_steps(range(1, 1003), 102)
    assert (chosen[0], chosen[-1], len(set(chosen))) == (1, 1002, 102)
    assert chosen == sorted(chosen)
    assert max(after - before for before, after in pairwise(chosen)) <= 22
    for steps_an_epoch in (2, 4, 5, 10):
        assert {step % steps_an_epoch for step in chosen} == set(range(steps_an_epoch)), "other images, too"
    for many in range(3, 60):
        for most in range(3, many):
            few = chosen_steps(range(many), most)
            assert len(set(few)) == most and few == sorted(few), "each step once"
    assert chosen_steps([3, 4, 5], 2) == [3, 5] and chosen_steps([3, 4, 5], 1) == [5]
