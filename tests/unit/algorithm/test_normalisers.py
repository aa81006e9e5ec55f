"""Each normaliser against weights worked out by hand: two tokens, none, and four, of at most eight."""

import pytest

from rft_cluster.algorithm import NORMALISERS

LENGTHS = [2, 0, 4]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("completion", [1 / 6, 0.0, 1 / 12]),  # a third for each completion, shared by its tokens
        ("token", [1 / 6, 0.0, 1 / 6]),  # six tokens
        ("constant", [1 / 24, 1 / 24, 1 / 24]),  # 8 tokens for each of three
    ],
)
def test_weights_by_hand(name, weights):
    assert NORMALISERS[name](LENGTHS, max_tokens=8) == pytest.approx(weights)


@pytest.mark.parametrize("name", NORMALISERS)
def test_nothing_to_weigh(name):
    assert NORMALISERS[name]([], max_tokens=8) == []


@pytest.mark.parametrize("name", ["completion", "token"])
def test_the_weights_of_all_tokens_add_up_to_one(name):
    lengths = [1, 7, 3, 2, 5, 5]
    weights = NORMALISERS[name](lengths, max_tokens=8)
    assert sum(length * weight for length, weight in zip(lengths, weights, strict=True)) == pytest.approx(1.0)
