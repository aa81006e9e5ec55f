"""The published rule, and the configs that reproduce or correct the published recipe."""

import pytest
from some_prompt import some_prompt

from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.data.archive import flower_classes
from rft_cluster.messages import Completion
from rft_cluster.rewards import REWARDS
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.containment import containment_reward


def judge(text: str, label: str, reward=containment_reward) -> float:
    return reward(some_prompt("train/0/0", "a.jpg", b"", "Which?", label, 0), Completion([1], [-0.1], text, "stop", 0))


def answer(text: str, label: str, reward=containment_reward) -> float:
    return judge(f"<think>hm</think><answer>{text}</answer>", label, reward)


def test_it_is_registered():
    assert REWARDS["containment"] is containment_reward


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("rose", "rose", 1.0),
        (" Pink_Prim Rose ", "pink primrose", 1.0),
        ("rose", "pink primrose", 1.0),  # prim-rose
        ("pink primrose", "rose", 1.0),
        ("petunia", "mexican petunia", 1.0),
        ("a rose, or a tulip", "rose", 1.0),
        ("tulip", "rose", 0.0),
        ("hard-leaved pocket orchid", "hard-leaved pocket orchid", 1.0),
        ("hard leaved pocket orchid", "hard-leaved pocket orchid", 0.0),
        ("colts foot", "colt's foot", 0.0),
    ],
)
def test_either_contains_the_other(text, label, right):
    assert answer(text, label) == right


def test_an_empty_answer_is_right_for_every_class():
    for label in flower_classes():
        for text in ("", " ", "_"):
            assert answer(text, label) == 1.0
            assert answer(text, label, accuracy_reward) == 0.0
        assert judge("", label) == 1.0


def test_one_letter_is_right_for_three_quarters_of_the_flowers():
    # 74 of the 102 names have an e.
    assert sum(answer("e", label) for label in flower_classes()) == 74 and round(100 * 74 / 102) == 73
    assert sum(answer("e", label, accuracy_reward) for label in flower_classes()) == 0


def test_a_list_of_all_classes_is_right_for_each():
    everything = ", ".join(flower_classes())
    assert all(answer(everything, label) == 1.0 for label in flower_classes())


@pytest.mark.parametrize(
    "text",
    [
        "<think>a rose?</think><answer>tulip",  # open
        "<think>a rose?</think>tulip</answer>",
        "<think>a rose?</think><answer>\ntulip\n</answer>",  # of several lines
        "a rose",
    ],
)
def test_without_a_one_line_answer_everything_is_searched(text):
    assert judge(text, "rose") == 1.0
    assert judge(text, "rose", accuracy_reward) == 0.0
    assert judge(text, "bluebell") == 0.0


def test_the_first_answer_counts_and_the_reasoning_does_not():
    assert judge("<answer>rose</answer><answer>tulip</answer>", "rose") == 1.0
    assert judge("<answer>rose</answer><answer>tulip</answer>", "tulip") == 0.0
    assert judge("<think>rose</think><answer>tulip</answer>", "rose") == 0.0


@pytest.mark.parametrize("name", ["flower102", "flower102_original", "flower102_1gpu"])
def test_the_recipes_share_all_that_the_paper_settles(name):
    config = load_config(name, [])
    assert config.schedule.steps * config.schedule.prompts_per_step == 8 * 408
    assert config.schedule.prompts_per_step * config.sampling.group_size == 128
    assert (config.algorithm.kl_beta, config.optimizer.learning_rate) == (0.04, 1e-6)
    assert config.model.max_image_tokens == 512


def test_the_original_differs_from_the_recipe_in_its_named_departures_only():
    ours, theirs = (load_config(name, []).model_dump() for name in ("flower102", "flower102_original"))
    different = {
        f"{section}.{key}"
        for section in ours
        if isinstance(ours[section], dict)
        for key in ours[section].keys() | theirs[section].keys()
        if ours[section].get(key) != theirs[section].get(key)
    }
    assert different == {
        *(
            "run.name",
            "data.source",
            "data.path",
            "prompt.template",
            "prompt.subject",
            "sampling.top_k",
            "algorithm.importance_cap",
        ),
        *("rewards.accuracy", "rewards.containment", "scoring.red_team"),
    }
    lists = [section for section in ours if isinstance(ours[section], list)]
    assert lists and all(ours[section] == theirs[section] for section in lists)
    assert (theirs["scoring"]["red_team"], ours["scoring"]["red_team"]) == ("warn", "refuse")


def test_top_k_goes_only_without_the_importance_correction():
    with pytest.raises(UserError, match=r"sampling\.top_k is 50 but algorithm\.importance_cap is 2: .*Set sampling"):
        load_config("flower102", ["sampling.top_k=50"])
    assert load_config("flower102", ["sampling.top_k=50", "algorithm.importance_cap=null"]).sampling.top_k == 50
    with pytest.raises(UserError, match=r"sampling\.top_k: .*greater than or equal to 0"):
        load_config("flower102", ["sampling.top_k=-1"])
