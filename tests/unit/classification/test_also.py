import pytest

from rft_cluster.classification.also import change
from rft_cluster.classification.report import Judged


def judged(flags: str) -> list[Judged]:
    return [Judged(str(i), "wren", "", None, flag == "1", False, True) for i, flag in enumerate(flags)]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("1" * 20, "1" * 10 + "0" * 10, "some was forgotten"),
        ("0" * 20, "1" * 10 + "0" * 10, "training helped there, too"),
        ("1" * 20, "1" * 19 + "0", "no clear change"),
    ],
)
def test_forgetting_is_a_paired_difference_whose_interval_is_below_0(before, after, said):
    assert change(judged(before), judged(after)).endswith(f"20 images): {said}")


def test_the_figures_are_those_of_the_paired_difference():
    said = change(judged("1" * 20), judged("1" * 10 + "0" * 10))
    # Agresti and Min: b = 0.5, c = 10.5 of 22; centre -0.4545, half 1.96 * sqrt(11 - 100 / 22) / 22 = 0.2263
    assert "was 100.0 % before training and is 50.0 % after, image by image -50.0 points (-68.1 to -22.8" in said


def test_other_images_and_none_are_not_compared():
    assert change([], judged("1")) == "" == change(judged("1"), judged("11"))
