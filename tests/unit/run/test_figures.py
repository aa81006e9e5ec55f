import math
from itertools import pairwise

from rft_cluster.run.figures import finite, rounded, thinned


def test_a_long_run_is_thinned_evenly_with_both_ends():
    assert thinned([1, 2, 3], 4) == [1, 2, 3]
    found = thinned(range(100_000), 100)
    assert len(found) == 100 and (found[0], found[-1]) == (0, 99_999)
    assert {b - a for a, b in pairwise(found)} <= {1010, 1011}


def test_what_is_no_number_has_no_place_in_a_curve():
    values = [finite(value) for value in (1, 0.5, True, None, "1", math.nan, math.inf, [1])]
    assert values == [1.0, 0.5, None, None, None, None, None, None]


def test_figures_of_a_page_have_as_many_digits_as_it_shows():
    assert [rounded(value, 4) for value in (0.123456, 12345.6, 3, None, math.inf)] == [0.1235, 12350.0, 3.0, None, None]
