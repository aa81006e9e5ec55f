import pickle

import pytest

from rft_cluster.messages import Completion, Group, Prompt
from rft_cluster.scorer import RewardError, Scorer


def group(label: str, *texts: str) -> Group:
    prompt = Prompt(f"train/3/{label}", "photos/a.png", b"", "Which flower?", label, 0)
    return Group(prompt, [1, 2], [Completion([1], [-0.1], text, "stop", 3) for text in texts])


def fails(prompt: Prompt, completion: Completion) -> float:
    raise KeyError(completion.text)


def not_a_number(prompt: Prompt, completion: Completion) -> float:
    return float("nan")


def nothing(prompt: Prompt, completion: Completion) -> None:
    return None


def yes(prompt: Prompt, completion: Completion) -> bool:
    return True


def test_totals_are_weighted_and_parts_are_not():
    full = "<think>red</think><answer>rose</answer>"
    groups = [group("rose", full, "<answer>rose</answer>", "rose"), group("tulip", full)]
    rewards = Scorer({"format": 0.5, "accuracy": 2.0}).score(groups)
    # 0.5 * 1 + 2 * 1; 0.5 * 0 + 2 * 1; nothing; the format alone.
    assert [[r.total for r in of_group] for of_group in rewards] == [[2.5, 2.0, 0.0], [0.5]]
    assert [r.parts for r in rewards[0]] == [
        {"format": 1.0, "accuracy": 1.0},
        {"format": 0.0, "accuracy": 1.0},
        {"format": 0.0, "accuracy": 0.0},
    ]


def test_a_reward_of_ones_own_is_a_part_under_its_path():
    name = f"{__name__}:yes"
    (reward,) = Scorer({name: 0.25}).score([group("rose", "x")])[0]
    assert (reward.total, reward.parts) == (0.25, {name: 1.0})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", "failed for .*KeyError"),
        ("not_a_number", "returned nan for"),
        ("nothing", "failed for .*TypeError"),
    ],
)
def test_a_failed_reward_is_never_zero(function, message):
    scorer = Scorer({"format": 1.0, f"{__name__}:{function}": 1.0})
    with pytest.raises(RewardError, match=message) as caught:
        scorer.score([group("rose", "the text")])
    assert all(part in str(caught.value) for part in (function, "train/3/rose", "'the text'"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - it crosses to the driver
