import pytest

from rft_cluster.algorithm.samples import build_samples
from rft_cluster.messages import Completion, Group, Prompt

PROMPTS = {"a": [1, 9, 9, 2], "b": [1, 9, 3]}


def prompt(name: str) -> Prompt:
    return Prompt(name, f"photos/{name}.png", b"", "Which?", "rose", 0)


def group(name: str, *lengths: int) -> Group:
    completions = [Completion([10] * n, [-0.5] * n, "x", "stop", 7) for n in lengths]
    return Group(prompt(name), PROMPTS[name], completions)


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


def test_a_completion_without_tokens_counts_and_is_left_out():
    # As in TRL, where its masked sum of 0 is divided by at least 1, and stands in the mean over the completions.
    built = build_samples([group("a", 2, 0)], [[1.0, -1.0]], keep_all=True)
    assert [one.weight for one in built] == pytest.approx([1 / 4])
