"""Runs as sequences of steps, made from parts, each with the step at which it must end."""

from itertools import product
from random import Random

import pytest
from some_prompt import some_prompt

from rft_cluster.messages import Completion, Group, Reward
from rft_cluster.run.stuck import SAID_AFTER, Stuck

PROMPT = some_prompt("train/0/0", "a.png", b"", "Which?", "rose", 0)
SIZE = 8
NOTHING, FORMAT, BOTH, TAGS = (0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)  # format and accuracy


def reward(parts: tuple[float, float], names=("format", "accuracy")) -> Reward:
    return Reward(sum(parts), dict(zip(names, parts, strict=True)))


def step(*kinds: tuple[float, float], cut: float = 0.0, groups: int = 2) -> tuple[list[Group], list[list[Reward]]]:
    """Groups whose completions have the rewards `kinds`, in turn; a share of them was cut."""
    completions = [Completion([1], [0.0], "", "length" if i < cut * SIZE else "stop", 0) for i in range(SIZE)]
    rewards = [reward(kinds[i % len(kinds)]) for i in range(SIZE)]
    return [Group(PROMPT, [1], completions)] * groups, [rewards] * groups


def see(watch: Stuck, groups: list[Group], rewards: list[list[Reward]]) -> str:
    return watch.see(groups, rewards, live=any(len({one.total for one in group} - {None}) > 1 for group in rewards))


def ends(watch: Stuck, steps) -> int | None:
    """The step, from 1, at which a run is ended."""
    return next((number for number, one in enumerate(steps, 1) if see(watch, *one)), None)


HEALTHY = [step(NOTHING, FORMAT), step(FORMAT, BOTH), step(FORMAT, BOTH, NOTHING, BOTH), step(TAGS, NOTHING, FORMAT)]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("bad", [step(NOTHING), step(NOTHING, cut=1.0)])
def test_a_run_that_earns_nothing_ends_after_so_many_steps(limit, before, bad):
    assert ends(Stuck(limit, 3), [*HEALTHY[:before], *[bad] * 30]) == before + limit


@pytest.mark.parametrize("seed", range(30))
def test_any_step_that_teaches_begins_the_count_anew(seed):
    rng = Random(seed)
    limit, run = rng.randint(2, 6), []
    for _ in range(20):
        run += [step(NOTHING)] * rng.randint(0, limit - 1) + [rng.choice(HEALTHY)]
    assert ends(Stuck(limit, 3), run) is None
    assert ends(Stuck(limit, 3), [*run, *[step(NOTHING)] * limit]) == len(run) + limit


@pytest.mark.parametrize(("classes", "groups"), product([2, 10, 102], [1, 4, 16]))
def test_wrong_answers_in_the_format_end_it_only_where_they_are_no_bad_luck(classes, groups):
    bad = step(FORMAT, groups=groups)
    enough = -(-10 * classes // (SIZE * groups))  # steps until there are 10 completions a class
    assert ends(Stuck(5, classes), [bad] * 200) == max(5, enough)


@pytest.mark.parametrize("kinds", [(BOTH,), (BOTH, FORMAT)])
def test_a_solved_task_goes_on(kinds):
    assert ends(Stuck(3, 2), [step(*kinds)] * 50) is None


def test_the_format_is_lost_only_where_it_was_or_where_nothing_is_left():
    """A question with tags that `format` does not know: answers are right or wrong, so there is something to learn."""
    assert ends(Stuck(3, 2), [step(TAGS, NOTHING)] * 50) is None
    assert ends(Stuck(3, 2), [step(FORMAT, BOTH), *[step(TAGS, NOTHING)] * 50]) == 4
    assert ends(Stuck(3, 2), [step(NOTHING)] * 50) == 3


def test_rewards_of_ones_own_that_never_differ():
    groups, _ = step(BOTH)
    same = [[Reward(0.5, {"mine:f": 0.5})] * SIZE] * 2
    assert ends(Stuck(5, 2), [(groups, same)] * 50) == 5


def test_masked_completions_are_looked_past():
    groups, rewards = step(NOTHING)
    masked = [[Reward(None, {}, {"mine:f": "failed"}), *group[1:]] for group in rewards]
    assert ends(Stuck(4, 2), [(groups, masked)] * 9) == 4


def test_off_is_off(capsys):
    assert ends(Stuck(0, 2), [step(NOTHING)] * 99) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("run", "cause"),
    [
        ([step(NOTHING, cut=1.0)] * 5, "100 % of the completions were cut: raise sampling.max_tokens"),
        ([step(FORMAT, BOTH), *[step(NOTHING)] * 5], "lower optimizer.learning_rate"),
        ([step(NOTHING)] * 5, "whether the question asks for what the rewards read"),
        ([step(FORMAT)] * 5, "every reward was 1.00: there is nothing to learn from. Look at what was written"),
    ],
)
def test_it_is_said_before_it_ends_and_then_why(run, cause, capsys):
    watch = Stuck(5, 2)
    *_, why = [see(watch, *one) for one in run]
    assert why.startswith("in the last 5 steps ") and cause in why
    assert ("no completion had the format" in why) == (run[-1] != step(FORMAT))
    (note,) = capsys.readouterr().out.splitlines()
    assert f"in the last {SAID_AFTER} steps" in note and "schedule.stop_when_stuck" in note


@pytest.mark.parametrize("limit", [1, 3, 0])
def test_gradients_that_are_not_finite_end_it_and_one_that_is_begins_the_count_anew(limit):
    watch = Stuck(limit, 3)
    seen = [watch.see(*HEALTHY[0], live=True, skipped=skipped) for skipped in (1, 2, 0, 1, 1, 1, 1)]
    assert [bool(reason) for reason in seen] == {
        1: [True, True, False, True, True, True, True],
        3: [False, False, False, False, False, True, True],
        0: [False] * 7,
    }[limit]
    if limit == 3:
        assert "in each of the last 3 steps the gradient was infinite" in seen[5]
        assert "Lower optimizer.learning_rate" in seen[5]
