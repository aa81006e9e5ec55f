import threading
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, product

import pytest
import torch

from rft_cluster.algorithm.samples import build_samples
from rft_cluster.learner.collate import collate
from rft_cluster.learner.packing import split_work
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Completion, Group, Prompt, TrainingSample
from rft_cluster.model.encoder import EncodedPrompt

PROMPTS = {"a": [1, 9, 9, 2], "b": [1, 9, 3]}


def prompt(name: str) -> Prompt:
    return Prompt(name, f"photos/{name}.png", b"", "Which?", "rose", 0)


def group(name: str, *lengths: int) -> Group:
    completions = [Completion([10] * n, [-0.5] * n, "x", "stop", 7) for n in lengths]
    return Group(prompt(name), PROMPTS[name], completions)


def sample(number: int, weight: float = 0.125) -> TrainingSample:
    return TrainingSample(prompt(f"p{number}"), [1, 2], [number, 0], [-0.5, -0.5], 1.0, weight, 7)


def samples(count: int) -> list[TrainingSample]:
    return [sample(number) for number in range(count)]


def numbers(batch: list[TrainingSample]) -> list[int]:
    return [one.token_ids[0] for one in batch if one.weight]


# --- from groups to samples


def test_weights_by_hand():
    # 3 completions: a third each, shared by 2, 5 and 4 tokens.
    built = build_samples([group("a", 2, 5), group("b", 4)], [[1.0, -1.0], [0.5]], keep_all=True)
    assert [one.weight for one in built] == pytest.approx([1 / 6, 1 / 15, 1 / 12])
    assert [one.advantage for one in built] == [1.0, -1.0, 0.5]
    assert [one.prompt.prompt_id for one in built] == ["a", "a", "b"]
    assert [one.prompt_token_ids for one in built] == [[1, 9, 9, 2], [1, 9, 9, 2], [1, 9, 3]]
    assert [len(one.generator_logprobs) for one in built] == [2, 5, 4]
    assert {one.policy_version for one in built} == {7}


def test_weights_of_a_step_s_tokens_sum_to_one():
    groups = [group("a", 1, 7, 3), group("b", 2), group("a", 5, 5)]
    built = build_samples(groups, [[1.0, 0.0, -1.0], [0.0], [0.0, 0.0]], keep_all=True)
    assert sum(one.weight * len(one.token_ids) for one in built) == pytest.approx(1.0)


def test_dead_groups_are_left_out_without_kl_but_count_in_the_mean():
    groups = [group("a", 2, 5), group("b", 4, 4)]
    built = build_samples(groups, [[1.0, -1.0], [0.0, 0.0]], keep_all=False)
    assert [one.prompt.prompt_id for one in built] == ["a", "a"]
    assert [one.weight for one in built] == pytest.approx([1 / 8, 1 / 20])  # a quarter each, not a half


@pytest.mark.parametrize("keep_all", [True, False])
def test_masked_completions_are_left_out_and_do_not_count(keep_all):
    # Two completions count: a half each, shared by 2 and 4 tokens.
    built = build_samples([group("a", 2, 5), group("b", 4, 3)], [[1.0, None], [-1.0, None]], keep_all)
    assert [(one.prompt.prompt_id, len(one.token_ids)) for one in built] == [("a", 2), ("b", 4)]
    assert [one.weight for one in built] == pytest.approx([1 / 4, 1 / 8])
    assert build_samples([group("a", 2, 5)], [[None, None]], keep_all) == []


def test_without_a_live_group_there_are_no_samples():
    assert build_samples([group("a", 2, 5)], [[0.0, 0.0]], keep_all=False) == []


def test_advantages_must_fit_the_groups():
    with pytest.raises(ValueError, match="zip"):
        build_samples([group("a", 2, 5)], [[1.0]], keep_all=True)
    with pytest.raises(ValueError, match="zip"):
        build_samples([group("a", 2)], [], keep_all=True)


# --- from samples to ranks


def asked(prompt_tokens: int, *lengths: int, name: str = "p") -> list[TrainingSample]:
    """Samples of one prompt, which adds `prompt_tokens` to a row; each completion adds its length less one."""
    return [
        TrainingSample(prompt(name), [1] * prompt_tokens, [number] * length, [-0.5] * length, 1.0, 0.125, 7)
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
def test_every_sample_is_dealt_once_in_equal_numbers_of_forwards(ranks, updates):
    for count, group_size, limit in product([1, 2, 3, 7, 8, 17], [1, 3, 8], [1, 9, 10_000]):
        given = [replace(one, prompt=prompt(f"p{number // group_size}")) for number, one in enumerate(samples(count))]
        work = split_work(given, ranks, updates, limit)
        assert len(work) == ranks
        # Each forward is a collective: all ranks make as many, in each update.
        assert len({tuple(len(update) for update in share) for share in work}) == 1
        for update in range(updates):
            batches = [batch for share in work for batch in share[update]]
            assert all(batches)
            assert all(row_tokens(batch) <= limit or len(batch) == 1 for batch in batches)
            dealt = sorted(number for batch in batches for number in numbers(batch))
            assert dealt == list(range(update * count // updates, (update + 1) * count // updates))
            for share in work:
                padded = any(one.weight == 0 for batch in share[update] for one in batch)
                assert not padded or all(len(batch) == 1 for batch in share[update]), "what it has is divided first"


def test_whole_groups_are_dealt_where_there_are_enough():
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
    ((forwards,),) = split_work(asked(6, 9, 9, 9, 9), ranks=1, updates=1, micro_batch_tokens=25)
    assert [numbers(batch) for batch in forwards] == [[0, 1], [2, 3]]
    ((forwards,),) = split_work(asked(6, 9, 9), ranks=1, updates=1, micro_batch_tokens=1)
    assert [numbers(batch) for batch in forwards] == [[0], [1]]


def test_a_rank_with_too_few_forwards_divides_its_own():
    # The first rank's 36 tokens are cut into two forwards of 4 + 16; the second rank's 18 would fit one.
    given = asked(4, 17, 17, name="a") + asked(2, 9, 9, name="b")
    work = split_work(given, ranks=2, updates=1, micro_batch_tokens=20)
    assert [[row_tokens(batch) for batch in share[0]] for share in work] == [[20, 20], [10, 10]]


def test_three_completions_over_two_ranks_by_hand():
    given = [replace(one, prompt=prompt("p")) for one in samples(3)]
    work = split_work(given, ranks=2, updates=1, micro_batch_tokens=1)
    assert [[numbers(batch) for batch in share[0]] for share in work] == [[[1], [2]], [[0], []]]
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


def test_the_split_changes_no_weight():
    for ranks, limit in product([1, 2, 3], [1, 8, 100]):
        work = split_work(samples(7), ranks, 1, limit)
        dealt = [one.weight for share in work for batch in share[0] for one in batch]
        assert sum(dealt) == pytest.approx(7 * 0.125)


# --- from samples to tensors


class Encoder:
    """Sees two patches for prompt a and one for b, whose values are the prompt's number."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        self.asked.append(prompt.prompt_id)
        number = "ab".index(prompt.prompt_id)
        patches = 2 - number
        pixels = torch.full((patches, 1176), float(number))
        return EncodedPrompt(PROMPTS[prompt.prompt_id], pixels, torch.tensor([[1, 1, patches]]))


def positions(prompt: EncodedPrompt) -> torch.Tensor:
    """Image tokens (9) share a place in time, and the text goes on after them; [3, P]."""
    return torch.tensor({4: [[0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 2, 3]], 3: [[0, 1, 2]] * 3}[len(prompt.token_ids)])


def test_a_batch_by_hand():
    first = TrainingSample(prompt("a"), PROMPTS["a"], [11, 12], [-0.1, -0.2], 1.5, 0.25, 7)
    second = TrainingSample(prompt("b"), PROMPTS["b"], [13, 14, 15, 16], [-0.3, -0.4, -0.5, -0.6], -0.5, 0.125, 7)
    third = TrainingSample(prompt("a"), PROMPTS["a"], [17], [-0.7], 0.0, 0.5, 7)
    encoder = Encoder()
    batch = collate([first, second, third], encoder, positions)
    # Prompt b, which is shorter, prompt a, then their completions, the shorter first, without their last tokens:
    # those of the second; nothing of the third; those of the first.
    assert batch.input_ids.tolist() == [[1, 9, 3, 1, 9, 9, 2, 13, 14, 15, 11]]
    # Completions of b go on after place 2, those of a after place 3.
    assert batch.position_ids[:, 0].tolist() == [
        [0, 1, 2, 0, 1, 1, 2, 3, 4, 5, 4],
        [0, 1, 2, 0, 1, 1, 2, 3, 4, 5, 4],
        [0, 1, 2, 0, 1, 2, 3, 3, 4, 5, 4],
    ]
    assert batch.layout.segments == ((3, 3), (4, 4), (3, 6), (1, 5))
    assert batch.layout.key_rows[7:].tolist() == [0, 1, 2, 7, 8, 9, 3, 4, 5, 6, 10]
    # The prompt's last token predicts the first token of each of its completions.
    assert batch.completion_ids.tolist() == [13, 14, 15, 16, 17, 11, 12]
    assert batch.predictor_index.tolist() == [2, 7, 8, 9, 6, 6, 10]
    assert batch.generator_logprobs.tolist() == pytest.approx([-0.3, -0.4, -0.5, -0.6, -0.7, -0.1, -0.2])
    assert batch.advantages.tolist() == [-0.5] * 4 + [0.0] + [1.5] * 2
    assert batch.weights.tolist() == [0.125] * 4 + [0.5] + [0.25] * 2
    # Images once a prompt, in the order of the prompts: b, a.
    assert batch.pixel_values[:, 0].tolist() == [1, 0, 0]
    assert batch.image_grid_thw.tolist() == [[1, 1, 1], [1, 1, 2]]
    assert encoder.asked == ["a", "b"], "each prompt is encoded once"


def test_the_dtypes_are_as_documented():
    batch = collate(build_samples([group("a", 2, 5)], [[1.0, -1.0]], keep_all=True), Encoder(), positions)
    whole = (batch.input_ids, batch.position_ids, batch.image_grid_thw, batch.predictor_index, batch.completion_ids)
    assert {tensor.dtype for tensor in whole} == {torch.int64}
    real = (batch.pixel_values, batch.generator_logprobs, batch.advantages, batch.weights)
    assert {tensor.dtype for tensor in real} == {torch.float32}
    assert batch.input_ids.shape == (1, 4 + 1 + 4)
    assert batch.position_ids.shape == (3, 1, 4 + 1 + 4)


@pytest.mark.parametrize(
    ("seen", "counts"),
    [([1, 9, 9, 9, 2], "into 4 tokens, the generator saw 5"), ([1, 9, 9, 3], "into 4 tokens, the generator saw 4")],
)
def test_other_prompt_tokens_than_the_generator_s_are_refused(seen, counts):
    right = TrainingSample(prompt("a"), PROMPTS["a"], [11], [-0.1], 1.0, 1.0, 7)
    odd = replace(right, prompt_token_ids=seen)
    for given in ([odd], [right, odd]):
        with pytest.raises(ValueError, match=f"a: the learner encodes the prompt {counts}"):
            collate(given, Encoder(), positions)


# --- prompts that come again


def seen(name: str, image: bytes, text: str = "Which?") -> Prompt:
    return replace(prompt(name), image=image, text=text)


def test_what_comes_again_is_encoded_once():
    encoder = Encoder()
    cache = PromptCache(encoder, 1e6)
    first = cache.encode(seen("a", b"1"))
    assert cache.encode(replace(seen("a", b"1"), prompt_id="b", seed=3)) is first, "by content, not by name"
    assert encoder.asked == ["a"]
    cache.encode(seen("b", b"2"))
    cache.encode(seen("b", b"1", text="Which flower?"))
    assert encoder.asked == ["a", "b", "b"]


def test_the_cache_keeps_what_came_first_within_its_bytes():
    encoder = Encoder()
    cache = PromptCache(encoder, 3 * 1176 * 4)  # a has two patches, b one
    order = [seen("a", b"1"), seen("a", b"2"), seen("b", b"3")]
    for _ in range(3):
        for one in order:
            cache.encode(one)
    assert encoder.asked == ["a", "a", "b", "a", "a"], "only the second has no room"


# --- prompts that are read ahead


class HeldUp(Encoder):
    """Encodes nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        assert self.go.wait(10)
        return super().encode(prompt)


def test_what_was_read_ahead_is_encoded_once_and_nobody_waits_for_it_before():
    encoder = HeldUp()
    cache = PromptCache(encoder, 0)  # no room: nothing is kept
    one, two = seen("a", b"1"), seen("b", b"2")
    cache.read_ahead([one, two], step=3)
    cache.read_ahead([two], step=4)
    assert encoder.asked == []
    encoder.go.set()
    first = cache.encode(one)
    assert first.token_ids == PROMPTS["a"]
    assert cache.encode(replace(one, prompt_id="b")) is first
    assert cache.encode(two).token_ids == PROMPTS["b"]
    assert encoder.asked == ["a", "b"]


def test_what_was_read_ahead_goes_with_its_step_and_later_steps_stay():
    encoder = Encoder()
    cache = PromptCache(encoder, 0)
    now, next_one = seen("a", b"1"), seen("b", b"2")
    cache.read_ahead([now], step=3)
    cache.read_ahead([next_one], step=4)
    cache.encode(now)
    cache.step_is_over(3)
    cache.encode(next_one)
    assert encoder.asked == ["a", "b"]
    cache.encode(now)
    assert encoder.asked == ["a", "b", "a"]


def test_what_was_read_ahead_needs_no_image_until_its_step_is_over():
    encoder = Encoder()
    cache = PromptCache(encoder, 0)
    cache.read_ahead([seen("a", b"1")], step=3)
    cache.read_ahead([seen("b", b"1")], step=4)  # the same image comes again
    assert cache.encode(seen("a", b"")) is cache.encode(seen("b", b""))
    cache.step_is_over(3)
    cache.encode(seen("b", b""))
    assert encoder.asked == ["a"]
    with pytest.raises(ValueError, match="a: came without its image, and was not read ahead"):
        cache.encode(seen("a", b""))


def test_what_a_later_step_asks_for_too_is_encoded_though_this_one_is_over():
    encoder = HeldUp()
    cache = PromptCache(encoder, 0)
    cache.read_ahead([seen("a", b"1"), seen("b", b"2")], step=3)  # one may be begun, the other waits
    cache.read_ahead([seen("b", b"2")], step=4)
    cache.step_is_over(3)
    encoder.go.set()
    assert cache.encode(seen("b", b"")).token_ids == PROMPTS["b"]


def test_what_is_not_asked_for_any_more_is_not_encoded():
    encoder = HeldUp()
    cache = PromptCache(encoder, 1e6)
    cache.read_ahead([seen("a", b"1"), seen("a", b"2"), seen("a", b"3")], step=0)  # the first is being encoded
    cache.step_is_over(0)
    encoder.go.set()
    assert cache.encode(seen("b", b"4")).token_ids == PROMPTS["b"]
    assert encoder.asked in (["a", "b"], ["b"])  # "b" alone where the thread had not begun


def test_what_cannot_be_encoded_says_so_when_it_is_asked_for():
    cache = PromptCache(Encoder(), 1e6)
    unknown = seen("c", b"1")
    cache.read_ahead([unknown], step=0)
    with pytest.raises(ValueError, match="substring"):
        cache.encode(unknown)
