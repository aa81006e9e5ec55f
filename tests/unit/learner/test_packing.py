from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, combinations_with_replacement, pairwise, product
from random import Random

import pytest
from some_prompt import some_prompt

from rft_cluster.learner.packing import split_work
from rft_cluster.messages import Prompt, TrainingSample


def prompt(name: str) -> Prompt:
    return some_prompt(name, f"photos/{name}.png", b"", "Which?", "rose", 0)


def sample(number: int, weight: float = 0.125) -> TrainingSample:
    return TrainingSample(prompt(f"p{number}"), [1, 2], [number, 0], [-0.5, -0.5], 1.0, weight, number)


def samples(count: int) -> list[TrainingSample]:
    return [sample(number) for number in range(count)]


def numbers(batch: list[TrainingSample]) -> list[int]:
    return [one.token_ids[0] for one in batch if one.weight]


def asked(prompt_tokens: int, *lengths: int, name: str = "p") -> list[TrainingSample]:
    """Samples of one prompt, which adds `prompt_tokens` to a row; each completion adds its length less one."""
    return [
        TrainingSample(prompt(name), [1] * prompt_tokens, [number] * length, [-0.5] * length, 1.0, 0.125, number)
        for number, length in enumerate(lengths)
    ]


def joined(groups: Iterable[list[TrainingSample]]) -> list[TrainingSample]:
    return list(chain.from_iterable(groups))


def row_tokens(batch: list[TrainingSample]) -> int:
    prompts = {one.prompt.prompt_id: len(one.prompt_token_ids) for one in batch}
    return sum(prompts.values()) + sum(len(one.token_ids) - 1 for one in batch)


def shape(batch: list[TrainingSample]) -> list[tuple[str, int]]:
    return [(one.prompt.prompt_id, len(one.token_ids)) for one in batch]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_every_sample_is_assigned_once_in_equal_numbers_of_micro_batches(ranks, updates):
    for count, group_size, limit in product([1, 2, 3, 7, 8, 17], [1, 3, 8], [1, 9, 10_000]):
        given = [replace(one, prompt=prompt(f"p{number // group_size}")) for number, one in enumerate(samples(count))]
        work = split_work(given, ranks, updates, limit)
        assert len(work) == ranks
        # Each forward is a collective: all ranks make as many, in each update.
        assert len({tuple(len(update) for update in share) for share in work}) == 1
        made = min(updates, count)
        assert len(work[0]) == made
        for update in range(made):
            batches = [batch for share in work for batch in share[update]]
            assert all(batches)
            assert all(row_tokens(batch) <= limit or len(batch) == 1 for batch in batches)
            assigned = sorted(number for batch in batches for number in numbers(batch))
            assert assigned == list(range(update * count // made, (update + 1) * count // made))
            for share in work:
                padded = any(one.weight == 0 for batch in share[update] for one in batch)
                assert not padded or all(len(batch) == 1 for batch in share[update]), "what it has is divided first"


def test_whole_groups_are_assigned_where_there_are_enough():
    # 6 + 8 = 14, 5 + 8, 4 + 7, 9 + 1 tokens: the largest with the smallest
    groups = [asked(6, 5, 5, name="a"), asked(5, 9, name="b"), asked(4, 8, name="c"), asked(9, 2, name="d")]
    ((first,),), ((second,),) = split_work(joined(groups), ranks=2, updates=1, micro_batch_tokens=100)
    assert shape(first) == [("a", 5), ("a", 5), ("d", 2)]
    assert shape(second) == [("b", 9), ("c", 8)]


def test_a_group_is_divided_where_that_lowers_the_largest_share():
    # Whole: 30 tokens for one rank, none for the other. Halved: 10 + 2 * 5 each.
    ((first,),), ((second,),) = split_work(asked(10, 6, 6, 6, 6), ranks=2, updates=1, micro_batch_tokens=100)
    assert [numbers(first), numbers(second)] == [[0, 1], [2, 3]]
    # Two groups for four ranks.
    work = split_work(asked(4, 6, 6, name="a") + asked(4, 6, 6, name="b"), ranks=4, updates=1, micro_batch_tokens=100)
    assert sorted(row_tokens(share[0][0]) for share in work) == [9, 9, 9, 9]
    # Three groups of 8 + 4 * 8 for two ranks: 80 and 40 whole, 64 and 64 with the third halved.
    work = split_work(
        asked(8, 9, 9, 9, 9, name="a") + asked(8, 9, 9, 9, 9, name="b") + asked(8, 9, 9, 9, 9, name="c"),
        ranks=2, updates=1, micro_batch_tokens=100,
    )  # fmt: skip
    assert [row_tokens(share[0][0]) for share in work] == [64, 64]


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("size", range(1, 13))
def test_a_group_is_divided_as_equally_as_may_be(size, ranks):
    work = split_work(asked(572, *[200] * size), ranks, updates=1, micro_batch_tokens=100_000)
    sizes = [len(numbers(share[0][0])) for share in work]
    assert sum(sizes) == size and max(sizes) - min(sizes) <= 1


def test_three_ranks_share_a_group_of_eight_by_hand():
    work = split_work(asked(572, *[201] * 8), ranks=3, updates=1, micro_batch_tokens=100_000)
    # 3, 3 and 2 completions of 200 beside the prompt; in halves it would be 4, 2 and 2, and 1372 at most.
    assert sorted(row_tokens(share[0][0]) for share in work) == [972, 1172, 1172]


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_of_the_row_of_samples_gives_a_smaller_largest_share(seed):
    rng = Random(seed)
    ranks = rng.randint(2, 4)
    groups = [
        asked(rng.randint(1, 30), *(rng.randint(1, 20) for _ in range(rng.randint(1, 4))), name=str(index))
        for index in range(rng.randint(1, 3))
    ]
    given = joined(groups)
    every = range(len(given) + 1)
    best = min(
        max(row_tokens(given[a:b]) for a, b in pairwise([0, *cuts, len(given)]))
        for cuts in combinations_with_replacement(every, ranks - 1)
    )
    work = split_work(given, ranks, updates=1, micro_batch_tokens=100_000)
    largest = max(row_tokens([one for one in share[0][0] if one.weight]) for share in work)
    assert largest <= best


def test_a_group_larger_than_a_forward_is_cut_into_as_few_as_hold_it():
    # 8 of 10 beside 6 tokens, 36 at most: 3, 3 and 2; in halves it would be four micro-batches of 2.
    ((micro_batches,),) = split_work(asked(6, *[11] * 8), ranks=1, updates=1, micro_batch_tokens=36)
    assert sorted(map(len, micro_batches)) == [2, 3, 3]


def test_a_group_is_not_divided_where_reading_its_prompt_twice_costs_more():
    # Two groups of 100 + 2 * 1 and one of 100 + 1: 203 tokens at most; halved ones would make it 302.
    groups = [asked(100, 2, 2, name="a"), asked(100, 2, 2, name="b"), asked(100, 2, name="c")]
    work = split_work(joined(groups), ranks=2, updates=1, micro_batch_tokens=1000)
    assert sorted(row_tokens(share[0][0]) for share in work) == [102, 203]


def test_a_forward_holds_so_many_tokens():
    # 10 tokens each: two in a forward of 20, and a rank with one forward would have to wait in the second.
    given = joined(asked(6, 3, 3, name=name) for name in "abcdef")
    work = split_work(given, ranks=2, updates=1, micro_batch_tokens=20)
    assert [[row_tokens(batch) for batch in share[0]] for share in work] == [[20, 10], [20, 10]]


def test_a_group_larger_than_a_forward_is_cut_and_a_completion_never():
    ((micro_batches,),) = split_work(asked(6, 9, 9, 9, 9), ranks=1, updates=1, micro_batch_tokens=25)
    assert [numbers(batch) for batch in micro_batches] == [[0, 1], [2, 3]]
    ((micro_batches,),) = split_work(asked(6, 9, 9), ranks=1, updates=1, micro_batch_tokens=1)
    assert [numbers(batch) for batch in micro_batches] == [[0], [1]]


def test_a_rank_with_too_few_micro_batches_divides_its_own():
    # The first rank's 36 tokens are cut into two micro-batches of 4 + 16; the second rank's 18 would fit one.
    given = asked(4, 17, 17, name="a") + asked(2, 9, 9, name="b")
    work = split_work(given, ranks=2, updates=1, micro_batch_tokens=20)
    assert [[row_tokens(batch) for batch in share[0]] for share in work] == [[20, 20], [10, 10]]


def test_three_completions_over_two_ranks_by_hand():
    given = [replace(one, prompt=prompt("p")) for one in samples(3)]
    work = split_work(given, ranks=2, updates=1, micro_batch_tokens=1)
    assert [[numbers(batch) for batch in share[0]] for share in work] == [[[0], [1]], [[2], []]]
    (padding,) = work[1][0][1]
    assert padding.weight == 0.0
    assert (padding.token_ids, padding.advantage) == ([0, 0], 1.0)  # a real sample, so the forward is a usual one


def test_one_update_leaves_the_weights():
    work = split_work(samples(3), ranks=2, updates=1, micro_batch_tokens=100)
    assert [one.weight for share in work for batch in share[0] for one in batch] == [0.125] * 3


def test_each_of_several_updates_weighs_as_much_as_a_step():
    # 5 samples of 1/5 in 2 updates: 2 scaled by 5/2, 3 scaled by 5/3; either sums to 1.
    work = split_work([sample(number, 0.2) for number in range(5)], ranks=1, updates=2, micro_batch_tokens=100)
    assert [[numbers(batch) for batch in update] for update in work[0]] == [[[0, 1]], [[2, 3, 4]]]
    weights = [[one.weight for batch in update for one in batch] for update in work[0]]
    assert weights[0] == pytest.approx([0.5, 0.5])
    assert weights[1] == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_of_fewer_samples_than_updates_each_has_one_of_its_own():
    """An update of nothing would count as one, and AdamW makes none of it."""
    work = split_work(samples(2), ranks=2, updates=4, micro_batch_tokens=100)
    found = [[[numbers(batch) for batch in update] for update in share] for share in work]
    assert [sorted(number for share in found for batch in share[update] for number in batch) for update in (0, 1)] == [
        [0],
        [1],
    ]
    assert [len(share) for share in work] == [2, 2]


def test_the_split_changes_no_weight():
    for ranks, limit in product([1, 2, 3], [1, 8, 100]):
        work = split_work(samples(7), ranks, 1, limit)
        assigned = [one.weight for share in work for batch in share[0] for one in batch]
        assert sum(assigned) == pytest.approx(7 * 0.125)
