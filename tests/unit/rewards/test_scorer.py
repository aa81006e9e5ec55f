import asyncio
import pickle
import time

import pytest
from some_prompt import some_prompt

from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.data.images import image_sha256
from rft_cluster.messages import Completion, Group, Reward
from rft_cluster.rewards.scorer import Scorer, check_failures

FULL = "<think>red</think><answer>rose</answer>"
IMAGES = {image_sha256(b""): b""}
MOODY = "tests.unit.rewards.own_functions:moody"


def score(scorer: Scorer, groups: list[Group], **more: int) -> list[list[Reward]]:
    return asyncio.run(scorer.score(groups, **more))


def group(label: str, *texts: str) -> Group:
    prompt = some_prompt(f"train/3/{label}", "photos/a.png", b"", "Which flower?", label, 0)
    return Group(prompt, [1, 2], [Completion([1], [-0.1], text, "stop", 3) for text in texts])


@pytest.fixture
def scorer(request):
    """One with the weights and limits of the test, and its processes ended after it."""
    made = []

    def make(weights: dict[str, float], **limits: float) -> Scorer:
        made.append(Scorer(weights, ScoringSection(**limits), IMAGES))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_totals_are_weighted_and_parts_are_not(scorer):
    groups = [group("rose", FULL, "<answer>rose</answer>", "rose"), group("tulip", FULL)]
    rewards = score(scorer({"format": 0.5, "accuracy": 2.0}), groups)
    # 0.5 * 1 + 2 * 1; 0.5 * 0 + 2 * 1; nothing; the format alone.
    assert [[r.total for r in of_group] for of_group in rewards] == [[2.5, 2.0, 0.0], [0.5]]
    assert [r.parts for r in rewards[0]] == [
        {"format": 1.0, "accuracy": 1.0},
        {"format": 0.0, "accuracy": 1.0},
        {"format": 0.0, "accuracy": 0.0},
    ]
    assert not any(r.failures for of_group in rewards for r in of_group)


def test_a_reward_of_ones_own_is_a_part_under_its_path(scorer):
    (reward,) = score(scorer({MOODY: 0.25, "format": 1.0}), [group("rose", FULL)])[0]
    assert (reward.total, reward.parts, reward.failures) == (1.125, {MOODY: 0.5, "format": 1.0}, {})


def test_the_log_has_a_line_a_call_and_a_warning_for_each_reward_that_failed(scorer, capsys):
    score(scorer({"format": 1.0, MOODY: 1.0}, failure_budget=0.5), [group("rose", FULL, "raise"), group("tulip", "x")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("score", "WARNING"))]
    assert lines[0].startswith("score: 2 groups from ") and "reward 1.000 on average" in lines[0]
    assert [line.startswith(f"WARNING: rewards.{MOODY} failed on 1 completions") for line in lines[1:]] == [True]


def test_a_failure_masks_its_own_completion_and_is_never_zero(scorer):
    weights = {"format": 1.0, MOODY: 1.0}
    rewards = score(
        scorer(weights, time_limit=1.0, failure_budget=0.5),
        [group("rose", FULL, "raise", "x", "nan"), group("tulip", "die", FULL, "hang", "x")],
    )
    assert [[r.total for r in of_group] for of_group in rewards] == [[1.5, None, 0.5, None], [None, 1.5, None, 0.5]]
    masked = [r for of_group in rewards for r in of_group if r.total is None]
    assert [r.parts for r in masked] == [{"format": 0.0}] * 4
    reasons = [r.failures[MOODY] for r in masked]
    assert reasons[0].startswith("KeyError: 'petal' (own_functions.py, line ")
    assert reasons[1:] == [
        "returned nan, not a finite number",
        "its process died (exit code 7)",
        "no answer within 1 s",
    ]


@pytest.mark.parametrize(("budget", "failed"), [(0.25, 2), (0.0, 0), (0.13, 1)])
def test_as_many_may_fail_as_the_budget_says(scorer, budget, failed):
    texts = ["raise"] * failed + ["x"] * (8 - failed)  # of 8: a share of 0.125 each
    one = scorer({MOODY: 1.0}, failure_budget=budget)
    rewards = score(one, [group("rose", *texts[:4]), group("tulip", *texts[4:])])
    assert sum(r.total is None for of_group in rewards for r in of_group) == failed
    with pytest.raises(UserError):
        score(one, [group("rose", "raise", *texts[:3]), group("tulip", *texts[4:])])


def test_a_part_of_a_step_is_held_against_the_whole_step(scorer):
    one = scorer({MOODY: 1.0}, failure_budget=0.25)
    part = [group("rose", "raise", "raise", "x", "x")]
    first, second = score(one, part, completions=8), score(one, part, completions=8)  # 2 of 8 each
    with pytest.raises(UserError, match="on 4 of the 8 completions"):
        check_failures([*part, *part], [*first, *second], 8, 0.25)


def test_more_stop_the_run_at_once_and_say_why(scorer):
    groups = [group("rose", "x", "raise", "nan", "x"), group("tulip", "x", "x", "hang", "hang")]
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        score(scorer({"format": 1.0, MOODY: 1.0}, time_limit=60.0), groups)
    assert time.monotonic() - start < 30, "the second group is not scored any more"
    message = str(caught.value)
    assert f"rewards.{MOODY} failed on 2 of the 4 completions that were scored, of 8 in the step" in message
    assert "allows 10 % of a step" in message
    assert "The first failure: KeyError: 'petal'" in message and "on train/3/rose (photos/a.png)" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # noqa: S301 - it crosses to the driver


def test_what_fails_on_everything_cannot_stay_within_a_budget(scorer):
    with pytest.raises(ValueError, match="less than 1"):
        ScoringSection(failure_budget=1.0)
    with pytest.raises(UserError, match="failed on 2 of the 2"):
        score(scorer({MOODY: 1.0}, failure_budget=0.99), [group("rose", "raise", "nan")])


def test_a_fault_of_a_built_in_reward_is_ours_and_is_raised(scorer):
    with pytest.raises(ValueError, match="has no letter"):
        score(scorer({"accuracy": 1.0}), [group("--", "x")])


def test_a_name_that_is_none_is_refused_with_the_nearest(scorer):
    with pytest.raises(UserError, match=r"'acuracy' is unknown. Did you mean accuracy\?"):
        score(scorer({"acuracy": 1.0}), [group("rose", "x")])
