import sys
from types import ModuleType

import pytest
from some_prompt import some_prompt

from rft_cluster.algorithm import load_algorithm
from rft_cluster.algorithm.samples import Algorithm
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.messages import Completion, Group, Prompt, Reward

PROMPTS = {"a": [1, 9, 9, 2], "b": [1, 9, 3]}
MASKED = Reward(None, {"format": 1.0}, {"accuracy": "no answer within 10 s"})


def algorithm(**settings: object) -> Algorithm:
    overrides = [f"algorithm.{key}={value}" for key, value in settings.items()]
    return load_algorithm(load_config("digits", ["sampling.max_tokens=10", *overrides]))


def prompt(name: str) -> Prompt:
    return some_prompt(name, f"photos/{name}.png", b"", "Which?", "rose", 0)


def group(name: str, *lengths: int) -> Group:
    completions = [Completion([10] * n, [-0.5] * n, "x", "stop", 7) for n in lengths]
    return Group(prompt(name), PROMPTS[name], completions)


def rewards(*totals: float) -> list[Reward]:
    return [Reward(total, {"format": 0.0, "accuracy": total}) for total in totals]


# --- advantages


def test_masked_completions_are_in_no_advantage_but_keep_their_place():
    step = [[MASKED, *rewards(1.0), MASKED, *rewards(0.0)], [MASKED, MASKED], rewards(1.0, 3.0)]
    assert algorithm(advantage="dr_grpo").advantages(step) == [[None, 0.5, None, -0.5], [None, None], [-1.0, 1.0]]
    # A group of which nothing is known is no group: both others are live, so nothing is scaled.
    assert algorithm(advantage="gpg").advantages(step) == [[None, 0.5, None, -0.5], [None, None], [-1.0, 1.0]]


def test_a_step_in_which_all_is_masked_has_no_advantages():
    assert algorithm().advantages([[MASKED, MASKED], [MASKED]]) == [[None, None], [None]]


@pytest.mark.parametrize("valid", [[], [1.0], [1.0, 1.0]])
def test_a_group_with_fewer_than_two_different_rewards_teaches_nothing(valid):
    assert algorithm().advantages([[MASKED, *rewards(*valid)]]) == [[None, *[0.0] * len(valid)]]


def test_the_total_decides_what_the_advantage_sees():
    # In the weighted sum the two are equal; accuracy alone, normalised, is not.
    step = [[Reward(1.0, {"format": 1.0, "accuracy": 0.0}), Reward(1.0, {"format": 1.0, "accuracy": 1.0})]]
    assert algorithm(advantage="dr_grpo").advantages(step) == [[0.0, 0.0]]
    ((low, high),) = algorithm(advantage="dr_grpo", total="normalised_sum").advantages(step)
    assert low == -high < 0


# --- samples


def test_weights_by_hand():
    # 3 completions: a third each, shared by 2, 5 and 4 tokens.
    built = algorithm().samples([group("a", 2, 5), group("b", 4)], [[1.0, -1.0], [0.5]])
    assert [one.weight for one in built] == pytest.approx([1 / 6, 1 / 15, 1 / 12])
    assert [one.advantage for one in built] == [1.0, -1.0, 0.5]
    assert [one.prompt.prompt_id for one in built] == ["a", "a", "b"]
    assert [one.prompt_token_ids for one in built] == [[1, 9, 9, 2], [1, 9, 9, 2], [1, 9, 3]]
    assert [len(one.generator_logprobs) for one in built] == [2, 5, 4]


@pytest.mark.parametrize(("normaliser", "weights"), [("token", [1 / 11] * 3), ("constant", [1 / 30] * 3)])
def test_other_normalisers_weigh_over_the_whole_step(normaliser, weights):
    built = algorithm(normaliser=normaliser).samples([group("a", 2, 5), group("b", 4)], [[1.0, -1.0], [0.5]])
    assert [one.weight for one in built] == pytest.approx(weights)


@pytest.mark.parametrize(("kl_beta", "kept"), [(0.0, "aa"), (0.04, "aabb")])
def test_an_advantage_of_zero_is_left_out_only_without_kl_but_counts_in_the_mean(kl_beta, kept):
    groups = [group("a", 2, 5), group("b", 4, 4)]
    built = algorithm(kl_beta=kl_beta).samples(groups, [[1.0, -1.0], [0.0, 0.0]])
    assert "".join(one.prompt.prompt_id for one in built) == kept
    assert [one.weight for one in built[:2]] == pytest.approx([1 / 8, 1 / 20])  # a quarter each, not a half


@pytest.mark.parametrize("kl_beta", [0.0, 0.04])
@pytest.mark.parametrize(("normaliser", "weights"), [("completion", [1 / 4, 1 / 8]), ("token", [1 / 6] * 2)])
def test_masked_completions_are_left_out_and_do_not_count(kl_beta, normaliser, weights):
    # Two completions count: a half each, shared by 2 and 4 tokens; or 6 tokens.
    chosen = algorithm(kl_beta=kl_beta, normaliser=normaliser)
    built = chosen.samples([group("a", 2, 5), group("b", 3, 4)], [[1.0, None], [None, -1.0]])
    assert [(one.prompt.prompt_id, one.index, len(one.token_ids)) for one in built] == [("a", 0, 2), ("b", 1, 4)]
    assert [one.weight for one in built] == pytest.approx(weights)
    assert chosen.samples([group("a", 2, 5)], [[None, None]]) == []


def test_without_a_live_group_there_are_no_samples():
    assert algorithm(kl_beta=0).samples([group("a", 2, 5)], [[0.0, 0.0]]) == []


def test_advantages_must_fit_the_groups():
    with pytest.raises(ValueError, match="zip"):
        algorithm().samples([group("a", 2, 5)], [[1.0]])
    with pytest.raises(ValueError, match="zip"):
        algorithm().samples([group("a", 2)], [])


def test_a_completion_without_tokens_counts_and_is_left_out():
    # As in TRL, where its masked sum of 0 is divided by at least 1, and stands in the mean over the completions.
    built = algorithm().samples([group("a", 2, 0)], [[1.0, -1.0]])
    assert [one.weight for one in built] == pytest.approx([1 / 4])


# --- functions of one's own


@pytest.fixture
def own(monkeypatch) -> ModuleType:
    module = ModuleType("own")
    monkeypatch.setitem(sys.modules, "own", module)
    return module


def test_functions_of_ones_own(own):
    own.best = lambda rewards, weights: [max(reward.parts.values()) for reward in rewards]
    own.plain = lambda rewards: [[float(value) for value in group] for group in rewards]
    own.ones = lambda lengths, max_tokens: [1 for _ in lengths]
    chosen = algorithm(total="own:best", advantage="own.plain", normaliser="own:ones", kl_beta=0)
    advantages = chosen.advantages([rewards(2.0, 0.0), [MASKED]])
    assert advantages == [[2.0, 0.0], [None]]
    (sample,) = chosen.samples([group("a", 2, 5), group("b", 4)], advantages)
    assert (sample.advantage, sample.weight) == (2.0, 1.0)


async def asleep(rewards):
    return rewards


BAD = {
    "total": {
        "cannot be called as total(rewards, weights) -> a number for each: ": lambda rewards: rewards,
        "must return 3 finite numbers here": lambda rewards, weights: [1.0],
        "it returned [1000": lambda rewards, weights: [10**400] * len(rewards),  # an int that is no float
        "ZeroDivisionError: ": lambda rewards, weights: 1 / 0,
    },
    "advantage": {
        "cannot be called as advantage(rewards) -> a list for each group: ": lambda rewards, weights: rewards,
        "must return a list for each of 2 groups here": lambda rewards: rewards[0],
        "must return 3 finite numbers here": lambda rewards: [[float("nan")] * len(group) for group in rewards],
        "it returned None": lambda rewards: None,
        "KeyError: ": lambda rewards: ({}[group] for group in map(tuple, rewards)),
        "is async": asleep,
    },
    "normaliser": {
        "cannot be called as normaliser(lengths, max_tokens)": lambda lengths: lengths,
        "must return 5 finite numbers, none below 0, here": lambda lengths, max_tokens: [-1.0] * len(lengths),
    },
}


@pytest.mark.parametrize(("key", "message"), [(key, message) for key, bad in BAD.items() for message in bad])
def test_a_function_that_will_not_do_is_refused_before_anything_starts(own, key, message):
    own.mine = BAD[key][message]
    with pytest.raises(UserError) as caught:
        algorithm(**{key: "own:mine"})
    assert str(caught.value).startswith(f"algorithm.{key}: 'own:mine'") and message in str(caught.value)


@pytest.mark.parametrize(("key", "near"), [("total", "weighted_sum"), ("advantage", "rloo"), ("normaliser", "token")])
def test_an_unknown_name_is_refused_and_the_nearest_named(key, near):
    with pytest.raises(UserError, match=rf"algorithm\.{key}: '{near[:-1]}x' is unknown. Did you mean {near}\?"):
        algorithm(**{key: f"{near[:-1]}x"})


def test_a_function_without_a_signature_is_tried_all_the_same():
    with pytest.raises(UserError, match="must return 3 finite numbers here"):
        algorithm(advantage="builtins:max")


def test_what_fails_only_in_a_step_is_told_the_same_way(own):
    own.mine = lambda rewards: [
        [1 / len(rewards[0]) if len(rewards) > 1 else 1 / 0 for _ in group] for group in rewards
    ]
    with pytest.raises(UserError, match=r"algorithm\.advantage: 'own:mine': .*ZeroDivisionError"):
        algorithm(advantage="own:mine").advantages([rewards(1.0)])
