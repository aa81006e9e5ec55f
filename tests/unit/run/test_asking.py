"""Further prompts while few groups are live."""

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.messages import Reward
from rft_cluster.run.asking import FURTHER, further_rounds, prompts_of, wants_more
from rft_cluster.run.task import prepare

CONFIG = load_config("digits", ["schedule.min_live=0.5", "schedule.prompts_per_step=4", "data.augment.rotation=9"])
LIVE, ALL_WRONG = ([Reward(one, {"accuracy": one}) for one in own] for own in ((1.0, 0.0), (0.0, 0.0)))


def advantages(rewards):
    return [[None if one.total is None else one.total - group[0].total for one in group] for group in rewards]


@pytest.mark.parametrize(
    ("groups", "more"),
    [
        ("LL--", False),  # half of four
        ("L---", True),
        ("L-------", True),
        ("L------L", False),  # half of the four that are due, whatever is asked besides
        ("----" * FURTHER, True),
        ("----" * (1 + FURTHER), False),  # there is a limit
    ],
)
def test_further_prompts_are_asked_until_enough_groups_are_live(groups, more):
    rewards = [LIVE if one == "L" else ALL_WRONG for one in groups]
    assert wants_more(rewards, advantages, CONFIG.schedule) == more


def test_without_the_switch_nothing_is_asked_and_no_advantage_is_computed_twice():
    plain = load_config("digits", ["schedule.prompts_per_step=4"])
    assert not wants_more([ALL_WRONG] * 4, lambda _: pytest.fail("computed"), plain.schedule)


def test_rounds_differ_and_epochs_do_not_depend_on_them():
    task = prepare(CONFIG)
    due, *further = prompts_of(CONFIG, task, 5), *further_rounds(CONFIG, task, 5)
    assert len(further) == FURTHER and further == list(further_rounds(CONFIG, task, 5))
    asked = [prompt for own in (due, *further) for prompt in own]
    assert [prompt.prompt_id for prompt in asked] == [f"train/5/{index}" for index in range(4 * (1 + FURTHER))]
    assert len({prompt.seed for prompt in asked}) == len({p.example.image.augmentation for p in asked}) == len(asked)
    assert all(len({prompt.example_id for prompt in own}) == 4 for own in further)
    assert [own for own in further if own in further_rounds(CONFIG, task, 6)] == []
    plain = CONFIG.model_copy(update={"schedule": CONFIG.schedule.model_copy(update={"min_live": 0.0})})
    assert prompts_of(plain, task, 5) == due and list(further_rounds(plain, task, 5)) == []


def test_with_sft_there_are_no_groups():
    with pytest.raises(
        UserError, match=r"schedule\.min_live is 0\.5, but with algorithm\.objective sft no completions"
    ):
        load_config("digits", ["schedule.min_live=0.5", "algorithm.objective=sft", "algorithm.kl_beta=0"])
