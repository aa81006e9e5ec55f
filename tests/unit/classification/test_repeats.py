import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import permutation_test

from rft_cluster.classification.apart import NOTE
from rft_cluster.classification.intervals import paired_difference, sign_flip
from rft_cluster.classification.repeats import Repeat, Row, against, least_p, summary, table


def repeat(seed: int, right: str, images: str = "") -> Repeat:
    """A run that answered right where `right` has a 1. The test images are those of the seed, if not told otherwise."""
    flags = tuple(one == "1" for one in right)
    baselines = {"nearest_neighbour": seed / 100, "sft": 0.5}  # SFT is measured where asked
    return Repeat(seed, len(flags), 0.1, sum(flags) / len(flags), 1.0, baselines, images or f"of {seed}", flags)


def row(name: str, *repeats: Repeat, missing: tuple[int, ...] = ()) -> Row:
    return Row(name, {"row": name}, repeats, missing)


DEFAULT = row("default", repeat(41, "1100"), repeat(42, "1110"), repeat(43, "1000"))
BETTER = row("bet|ter", repeat(41, "1110"), repeat(42, "1111"), repeat(43, "1001"))


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([5], 1.0),  # either sign is as likely: one seed shows nothing
        ([3, 4], 0.5),  # +7 and -7 of +7, +1, -1, -7
        ([1, 2, 3, 4, 5], 2 / 32),  # the best of five seeds
        ([1, 2, 3, -1, 5], 6 / 32),  # sum 10 of 12: all +, one of the two 1s -, and their opposites
        ([0, 0], 1.0),
        ([0, 0, 2], 1.0),  # a seed without a difference says nothing
        ([2, -2], 1.0),
    ],
)
def test_the_sign_flip_test_by_hand(differences, p):
    assert sign_flip(differences) == p
    assert p >= least_p(len(differences))


@pytest.mark.parametrize("seed", range(8))
def test_the_sign_flip_test_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    differences = rng.integers(-4, 9, 2 + seed).tolist()
    theirs = permutation_test((differences,), np.sum, permutation_type="samples").pvalue
    assert sign_flip(differences) == pytest.approx(theirs)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="nothing to compare"):
        sign_flip([])


def test_rows_are_paired_by_seed_and_by_image():
    found = against(BETTER, DEFAULT)
    assert found["differences"] == [0.25, 0.25, 0.25] and found["median"] == 0.25
    assert (found["p"], found["least_p"], found["seeds"]) == (0.25, 0.25, [41, 42, 43])  # +3 or -3 of eight sums
    # The pairs of all images, seed by seed: 1100 1110 1000 against 1110 1111 1001.
    pooled = [[one == "1" for one in flags] for flags in ("110011101000", "111011111001")]
    assert found["images"] == paired_difference(*pooled)
    assert (found["images"]["only_first"], found["images"]["only_second"], found["images"]["n"]) == (0, 3, 12)


def test_only_seeds_of_both_rows_with_the_same_test_images_are_paired():
    other = row("other", repeat(40, "1111"), repeat(42, "0000", images="others"), repeat(43, "1111"))
    found = against(other, DEFAULT)
    assert (found["seeds"], found["differences"]) == ([43], [0.75])
    assert against(row("none", repeat(44, "1")), DEFAULT) is None


def test_without_recorded_answers_only_the_seeds_are_compared():
    old = Repeat(41, 4, 0.1, 0.75, 1.0, {}, "of 41", ())
    found = against(row("old", old), DEFAULT)
    assert found["images"] is None and found["differences"] == [0.25]


def test_a_row_has_the_median_and_the_range_of_its_seeds():
    found = summary(DEFAULT, DEFAULT)
    assert (found["rate"], found["range"], found["interval"]) == (0.5, [0.25, 0.75], None)
    assert found["baselines"] == {"nearest_neighbour": 0.42, "sft": 0.5} and found["against"] is None
    one = summary(row("one", repeat(41, "1100")), DEFAULT)
    assert one["interval"] == pytest.approx([0.1500, 0.8500], abs=1e-4)  # Wilson's of 2 of 4


def test_the_table():
    half = row("half", repeat(41, "1110", images="others"), repeat(42, "1111"))
    rows = [summary(one, DEFAULT) for one in (DEFAULT, BETTER, row("none", missing=(41, 42)), half)]
    head, rule, *lines = table(json.loads(json.dumps(rows)), "default").splitlines()
    assert head == (
        "| row | before | after | range over seeds | seeds | less default, by seed | p | the same, image by image "
        "| format | 1-nearest neighbour on pixels | supervised fine-tuning | images |"
    )
    cells = [line.count(" | ") for line in (head, *lines[:4])]
    assert cells == [cells[0]] * 5 and rule.count("---|") == cells[0] + 1
    assert lines[0].startswith(
        "| default | 10.0 % | **50.0 %** | 25.0 to 75.0 | 41, 42, 43 | - | - | - | 100.0 % | 42.0 %"
    )
    assert lines[1].startswith(
        "| bet\\|ter | 10.0 % | **75.0 %** | 50.0 to 100.0 | 41, 42, 43 | +25.0 (+25.0 to +25.0) | 0.25 | +25.0 ("
    )
    assert lines[2].startswith("| none | - | - | - | none; missing 41, 42 | - |")
    assert "| 41, 42 | seeds 42: +25.0 (+25.0 to +25.0) | 1 |" in lines[3], "seed 41 had other test images"
    assert "two-sided: at least 1 with 1 seed, 0.25 with 3 seeds." in lines[5]


def test_the_table_of_a_single_seed_has_the_interval_of_its_images():
    alone = row("alone", repeat(41, "1100"))
    head, _, line = table([summary(alone, alone)], "alone").splitlines()
    assert "| after | 95 % interval | seeds | format |" in head
    assert line.startswith("| alone | 10.0 % | **50.0 %** | 15.0 to 85.0 | 41 | 100.0 % |")
    lost = row("alone", repeat(41, "1100"), missing=(42,))
    head, _, line = table([summary(lost, lost)], "alone").splitlines()
    assert "| range over seeds |" in head and "| 50.0 to 50.0 | 41; missing 42 |" in line


def test_seen_and_unseen_classes_have_columns_of_their_own():
    repeats = [replace(repeat(seed, "1100"), parts={"seen": seed / 100, "unseen": 0.0}) for seed in (41, 43)]
    parts, whole = row("parts", *repeats), row("whole", repeat(41, "1110"), repeat(43, "1110"))
    assert summary(parts, whole)["parts"] == {"seen": 0.42, "unseen": 0.0} and summary(whole, whole)["parts"] == {}
    rows = [summary(one, whole) for one in (whole, parts, row("none", missing=(41,)))]
    head, rule, *lines = table(rows, "whole").splitlines()
    assert "| range over seeds | seen classes | unseen classes | seeds |" in head
    assert [line.count(" | ") for line in lines[:3]] == [head.count(" | ")] * 3 == [rule.count("---|") - 1] * 3
    assert "| 75.0 to 75.0 | - | - | 41, 43 |" in lines[0] and "| 50.0 to 50.0 | 42.0 % | 0.0 % | 41, 43 |" in lines[1]
    assert lines[-1] == f"With unseen classes, {NOTE}."
