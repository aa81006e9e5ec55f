from itertools import product

import pytest
import torch

from rft_cluster.batching import build_samples, collate, split_work
from rft_cluster.messages import Completion, Group, Prompt, TrainingSample
from rft_cluster.qwen2vl import EncodedPrompt

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


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_every_sample_is_dealt_once_in_equal_numbers_of_forwards(ranks, updates):
    for count, micro_batch in product([1, 2, 3, 7, 8, 16, 17], [1, 3, 100]):
        work = split_work(samples(count), ranks, updates, micro_batch)
        assert len(work) == ranks
        # Each forward is a collective: all ranks make as many, in each update.
        assert len({tuple(len(update) for update in share) for share in work}) == 1
        batches = [batch for share in work for update in share for batch in update]
        assert all(0 < len(batch) <= micro_batch for batch in batches)
        assert sorted(number for batch in batches for number in numbers(batch)) == list(range(count))


def test_three_samples_over_two_ranks_by_hand():
    work = split_work(samples(3), ranks=2, updates=1, micro_batch=1)
    assert [[numbers(batch) for batch in share[0]] for share in work] == [[[0], []], [[1], [2]]]
    (padding,) = work[0][0][1]
    assert padding.weight == 0.0
    assert (padding.token_ids, padding.advantage) == ([0, 0], 1.0)  # a real sample, so the forward is a usual one


def test_a_micro_batch_holds_so_many():
    work = split_work(samples(8), ranks=2, updates=1, micro_batch=3)
    assert [[numbers(batch) for batch in share[0]] for share in work] == [[[0, 1, 2], [3]], [[4, 5, 6], [7]]]


def test_one_update_leaves_the_weights():
    work = split_work(samples(3), ranks=2, updates=1, micro_batch=8)
    assert [one.weight for share in work for batch in share[0] for one in batch] == [0.125] * 3


def test_each_of_several_updates_weighs_as_much_as_a_step():
    # 5 samples of 1/5 in 2 updates: 2 scaled by 5/2, 3 scaled by 5/3; either sums to 1.
    work = split_work([sample(number, 0.2) for number in range(5)], ranks=1, updates=2, micro_batch=8)
    assert [[numbers(batch) for batch in update] for update in work[0]] == [[[0, 1]], [[2, 3, 4]]]
    weights = [[one.weight for batch in update for one in batch] for update in work[0]]
    assert weights[0] == pytest.approx([0.5, 0.5])
    assert weights[1] == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_the_split_changes_no_weight():
    for ranks in (1, 2, 3):
        for micro_batch in (1, 2, 5):
            work = split_work(samples(7), ranks, 1, micro_batch)
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


def test_a_batch_by_hand():
    first = TrainingSample(prompt("a"), PROMPTS["a"], [11, 12], [-0.1, -0.2], 1.5, 0.25, 7)
    second = TrainingSample(prompt("b"), PROMPTS["b"], [13, 14, 15, 16], [-0.3, -0.4, -0.5, -0.6], -0.5, 0.125, 7)
    third = TrainingSample(prompt("a"), PROMPTS["a"], [17], [-0.7], 0.0, 0.5, 7)
    encoder = Encoder()
    batch = collate([first, second, third], encoder, pad_id=8)
    assert batch.input_ids.tolist() == [
        [1, 9, 9, 2, 11, 12, 8],
        [1, 9, 3, 13, 14, 15, 16],
        [1, 9, 9, 2, 17, 8, 8],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0],
    ]
    assert batch.mask.tolist() == [
        [True, True, False, False],
        [True, True, True, True],
        [True, False, False, False],
    ]
    # The last prompt token predicts the first completion token.
    assert batch.predictor_index[batch.mask].tolist() == [3, 4, 2, 3, 4, 5, 3]
    assert batch.predictor_index.max() < batch.input_ids.shape[1]
    assert batch.completion_ids[batch.mask].tolist() == [11, 12, 13, 14, 15, 16, 17]
    assert batch.input_ids.gather(1, (batch.predictor_index + 1).clamp(max=6))[batch.mask].tolist() == [
        *(11, 12, 13, 14, 15, 16, 17)
    ]
    assert batch.generator_logprobs[batch.mask].tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7])
    assert batch.generator_logprobs.isfinite().all()
    assert batch.advantages.tolist() == [1.5, -0.5, 0.0]
    assert batch.weights.tolist() == [0.25, 0.125, 0.5]
    # Images in the order of the rows: a, b, a.
    assert batch.pixel_values[:, 0].tolist() == [0, 0, 1, 0, 0]
    assert batch.image_grid_thw.tolist() == [[1, 1, 2], [1, 1, 1], [1, 1, 2]]
    assert encoder.asked == ["a", "b"], "each prompt is encoded once"


def test_the_dtypes_are_as_documented():
    batch = collate(build_samples([group("a", 2, 5)], [[1.0, -1.0]], keep_all=True), Encoder(), pad_id=8)
    whole = (batch.input_ids, batch.attention_mask, batch.image_grid_thw, batch.predictor_index, batch.completion_ids)
    assert {tensor.dtype for tensor in whole} == {torch.int64}
    real = (batch.pixel_values, batch.generator_logprobs, batch.advantages, batch.weights)
    assert {tensor.dtype for tensor in real} == {torch.float32}
    assert batch.mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("seen", "counts"),
    [([1, 9, 9, 9, 2], "into 4 tokens, the generator saw 5"), ([1, 9, 9, 3], "into 4 tokens, the generator saw 4")],
)
def test_other_prompt_tokens_than_the_generator_s_are_refused(seen, counts):
    odd = TrainingSample(prompt("a"), seen, [11], [-0.1], 1.0, 1.0, 7)
    with pytest.raises(ValueError, match=f"a: the learner encodes the prompt {counts}"):
        collate([odd], Encoder(), pad_id=8)
