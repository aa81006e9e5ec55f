import pytest

from rft_cluster.evaluation import summarise
from rft_cluster.messages import Completion, Group, Prompt

FULL = "<think>red</think><answer>rose</answer>"


def group(*texts: str) -> Group:
    prompt = Prompt("test/0/0", "photos/a.png", b"", "Which flower?", "rose", 0)
    return Group(prompt, [1, 2], [Completion([1], [-0.1], text, "stop", 0) for text in texts])


def test_three_of_four_by_hand():
    # Wilson for 3 of 4 with z = 1.959964, z^2 = 3.841459:
    # centre (0.75 + z^2 / 8) / (1 + z^2 / 4) = 1.2301824 / 1.9603647 = 0.627527
    # half width z * sqrt(0.75 * 0.25 / 4 + z^2 / 64) / 1.9603647 = 1.959964 * 0.326952 / 1.9603647 = 0.326885
    evaluation = summarise(7, "test", [group(FULL), group(FULL), group("<answer>Rose</answer>"), group("rose")])
    assert (evaluation.step, evaluation.split, evaluation.n) == (7, "test", 4)
    assert evaluation.accuracy_strict == 0.75
    assert evaluation.format_rate == 0.5
    assert evaluation.interval == pytest.approx((0.300642, 0.954412), abs=1e-5)


def test_all_wrong_has_an_interval_above_zero():
    # Wilson for 0 of 10: from 0 to z^2 / (10 + z^2) = 3.841459 / 13.841459 = 0.277533
    evaluation = summarise(0, "validation", [group("<answer></answer>")] * 10)
    assert evaluation.accuracy_strict == 0.0
    assert evaluation.interval == pytest.approx((0.0, 0.277533), abs=1e-5)


def test_only_the_first_completion_counts():
    assert summarise(0, "test", [group("e", FULL)]).accuracy_strict == 0.0
    assert summarise(0, "test", [group(FULL, "e")]).accuracy_strict == 1.0


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no groups for split 'test' at step 7"):
        summarise(7, "test", [])
