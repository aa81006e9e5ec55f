import numpy as np
import pytest

from rft_cluster.classification.answers import Vote
from rft_cluster.classification.probabilities import Answer, Scores
from rft_cluster.classification.second_look import (
    Again,
    looked_again,
    most_probable,
    most_voted,
    second_look_lines,
    second_look_report,
)

CLASSES = ["iris", "rose", "tulip", "lily"]


def scores(*shares: float) -> Scores:
    return Scores(np.log([shares, np.full(len(shares), 1e-12)]), np.full((2, len(shares)), 3))


def test_the_most_probable_are_listed_in_the_order_of_the_classes():
    assert most_probable(scores(0.1, 0.4, 0.2, 0.3), CLASSES, 3) == ["rose", "tulip", "lily"]


@pytest.mark.parametrize(
    ("first", "counts", "count", "expected"),
    [
        ("tulip", {"rose": 5, "iris": 2, "tulip": 1}, 5, ["iris", "rose", "tulip"]),
        ("tulip", {"rose": 5, "iris": 2}, 2, ["rose", "tulip"]),
        (None, {"lily": 1, "iris": 3, "rose": 2}, 2, ["iris", "rose"]),
        (None, {}, 5, []),
        ("rose", {"rose": 8}, 5, ["rose"]),
    ],
)
def test_the_greedy_answer_and_the_most_voted_are_options(first, counts, count, expected):
    assert most_voted(first, Vote(None, 0.0, counts, ""), CLASSES, count) == expected


def test_the_options_share_what_they_had_and_the_others_keep_theirs():
    first = Answer({"rose": 0.5, "iris": 0.3, "lily": 0.15, "tulip": 0.05}, named=0.9)
    found = looked_again(first, Again(("iris", "rose"), "iris", scores(0.75, 0.25)), 1.0)
    assert dict(found.probabilities) == pytest.approx({"iris": 0.6, "rose": 0.2, "lily": 0.15, "tulip": 0.05})
    assert (found.label, found.named) == ("iris", 0.9)


def test_a_report_is_of_the_images_that_greedy_is_compared_on():
    again = [Again(("rose", "iris"), "rose"), Again(("iris", "lily"), "lily"), Again(("tulip",), "tulip")]
    figures = second_look_report(again, [False, True, True], ["rose", "iris", "tulip"])
    assert (figures["asked"], figures["strict"]["right"], figures["in_options"]["right"]) == (2, 2, 3)
    assert (figures["minus_greedy"]["only_first"], figures["minus_greedy"]["only_second"]) == (1, 1)
    (line,) = second_look_lines(figures)
    assert line.startswith("second look         66.7 %") and "2 images asked about again" in line
