import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.messages import Completion, LearnerStats, Reward
from rft_cluster.run.metrics import Stopwatch, clock, console, own_sinks, step_line
from rft_cluster.run.reference import page, step_fields
from tests.unit.run.begun import config
from tests.unit.run.steps import REWARDS, completion, group, reward, stats

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
ROW = {
    "step": 8,
    "reward": 0.75,  # (1 + 2 + 0 + 0) / 4
    "reward/format": 0.5,
    "reward/accuracy": 0.25,
    "reward_failures": 0,
    "groups": 2,
    "live_groups": 0.5,
    "skipped_groups": 1,
    "logprob_gap": 0.05,  # 0.4 / 8 tokens, as the next four
    "kl": 0.1,
    "entropy": 2.0,
    "importance": 1.0,
    "clipped": 0.25,
    "loss": -0.5,
    "grad_norm": 1.5,
    "learning_rate": 1e-4,
    "updates": 1,
    "skipped": 0,
    "memory_gib": 0.5,
    "completion_tokens": 4.0,  # (3 + 5 + 4 + 4) / 4
    "cut_short": 0.25,
    "oldest_version": 6,
    "staleness": 5 / 16,  # of 16 tokens 5 are of version 6, the others of 7, which step 8 begins with
    "staleness_max": 1,
    "tokens": 16,
    "tokens_trained": 8,
    "tokens_per_second": 4.0,  # 16 / (2 + 0 + 1.5 + 0.5)
    "seconds/generate": 2.0,
    "seconds/score": 0.0,
    "seconds/learn": 1.5,
    "seconds/transfer": 0.5,
    "replayed": False,
}


def test_a_step_by_hand():
    assert stats().row() == pytest.approx(ROW)


def test_a_step_of_sft_by_hand():
    """What compares the policy with another one, and what rewards say, has no figure."""
    target = Completion([5] * 4, [], "<answer>seven</answer>", "stop", 7)
    figures = {"grad_norm": 1.5, "learning_rate": 1e-4, "updates": 1, "memory_gib": 0.5}
    learned = LearnerStats(tokens=8, entropy=16.0, loss=0.25, **figures)
    unscored = [[Reward(0.0, {})], [Reward(0.0, {})]]
    found = stats(groups=[group(0, target), group(1, target)], rewards=unscored, advantages=[[1.0], [1.0]],
                  learned=learned, seconds={"generate": 0.5, "learn": 1.5})  # fmt: skip
    absent = {"reward", "reward/format", "reward/accuracy", "logprob_gap", "kl", "importance", "clipped",
              "seconds/score", "seconds/transfer"}  # fmt: skip
    changed = {"live_groups": 1.0, "skipped_groups": 0, "loss": 0.25, "cut_short": 0.0, "oldest_version": 7,
               "staleness": 0.0, "staleness_max": 0, "tokens": 8, "seconds/generate": 0.5}  # fmt: skip
    assert found.row() == pytest.approx({key: one for key, one in ROW.items() if key not in absent} | changed)
    expected = "step  8/80  loss 0.2500 nats a token  4 tok/s  [generate 25% learn 75%]"
    assert step_line(80, found, None) == expected
    assert "loss not finite" in step_line(80, replace(found, loss=None), None)


def test_staleness_counts_the_tokens_of_each_version():
    updated = replace(completion(10, version=5), version_spans=((5, 2), (6, 5), (7, 3)))
    found = stats(groups=[group(0, updated)], rewards=[[reward(1, 0)]])
    assert (found.staleness, found.staleness_max, found.oldest_version) == ((2 * 2 + 5 * 1) / 10, 2, 5)


def test_the_page_has_every_key_with_its_unit():
    assert PAGE.read_text() == page(), "python -m rft_cluster.run.reference > docs/metrics.md"
    fields = list(step_fields())
    assert all(unit and meaning for _, unit, meaning in fields)
    keys = {key.removesuffix("/NAME") for key, _, _ in fields}
    assert {key.split("/")[0] for key in ROW} | {"activation_gib"} == keys


def test_a_step_without_an_update_has_no_learner_figures():
    row = stats(learned=None).row()
    assert row["tokens_trained"] == 0
    assert row["reward"] == 0.75
    assert not {"logprob_gap", "kl", "loss", "learning_rate"} & set(row)


# The second group's rewards: one of one's own failed on the one, both on the other.
MASKED = [
    REWARDS[0],
    [
        Reward(None, {"format": 1.0}, {"accuracy": "no answer within 10 s"}),
        Reward(None, {}, {"accuracy": "returned nan", "format": "KeyError"}),
    ],
]


def test_masked_completions_are_counted_and_in_no_mean():
    found = stats(rewards=MASKED, advantages=[[-0.7, 0.7], [None, None]])
    assert (found.reward, found.reward_parts) == (1.5, {"format": 1.0, "accuracy": 0.5})
    assert found.live_groups == 0.5
    failures = {name: value for name, value in found.row().items() if name.startswith("reward_failures")}
    assert failures == {"reward_failures": 2, "reward_failures/accuracy": 2, "reward_failures/format": 1}
    line = step_line(120, found, seconds_left=5)
    assert "reward 1.50 (format 1.00 accuracy 0.50; 2 completions without: accuracy 2 format 1 failed)" in line
    assert "without" not in step_line(120, stats(), seconds_left=5)


def test_every_figure_is_finite_json():
    nan = LearnerStats(tokens=8, loss=math.nan, kl=math.inf, logprob_gap=math.nan, entropy=math.nan, skipped=1)
    for found in (stats(), stats(learned=None), stats(learned=LearnerStats()), stats(learned=nan)):
        json.dumps(found.row(), allow_nan=False)


def test_the_line_of_a_step():
    line = step_line(120, stats(), seconds_left=3725)
    assert "\n" not in line
    assert line.startswith("step   8/120 ")
    for part in (
        *("reward 0.75", "format 0.50", "accuracy 0.25", "live 0.50", "log-prob gap 0.0500", "4 tok/s"),
        *("generate 50%", "score 0%", "learn 38%", "transfer 12%", "1:02:05 left"),  # of 4 s
    ):
        assert part in line


def test_the_line_of_a_replayed_step_has_no_rate_and_does_not_count_for_the_time_left(capsys):
    show = console(120)
    for step, replayed in ((8, True), (9, False), (10, True)):
        own = {"replayed": True, "tokens_per_second": None, "seconds": {"learn": 0.1}} if replayed else {}
        show(replace(stats(step), **own))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("log-prob gap 0.0500  from the journal  [learn 100%]")
    assert "4 tok/s" in second
    assert third.endswith(f"from the journal  [learn 100%]  {clock(110 * 4)} left")


@pytest.mark.parametrize(
    ("cut", "of", "shown"), [(0, 8, ""), (1, 8, "12 %"), (1, 1000, "1 %"), (3, 4, "75 %"), (8, 8, "100 %")]
)
def test_the_line_of_a_step_says_how_many_answers_were_cut(cut, of, shown):
    groups = [group(0, *(completion(3, "length" if i < cut else "stop") for i in range(of)))]
    line = step_line(120, stats(groups=groups, rewards=[[reward(1, 0)] * of]), seconds_left=5)
    assert (f"  {shown} cut at max_tokens  " in line) if shown else ("cut" not in line)


def test_the_line_of_a_step_without_an_update_says_so():
    line = step_line(120, stats(learned=None), seconds_left=5)
    assert "no live group: no update" in line
    assert "gap" not in line
    line = step_line(120, stats(learned=LearnerStats(tokens=8, logprob_gap=math.nan, skipped=1)), seconds_left=5)
    assert "log-prob gap not finite" in line


async def later(stats):
    """Would never run: a sink is called, not awaited."""


def test_a_sink_of_ones_own_gets_every_step(tmp_path, monkeypatch):
    seen = []
    own = ModuleType("own")
    own.dashboard, own.other, own.later = seen.append, lambda: None, later
    monkeypatch.setitem(sys.modules, "own", own)
    for sink in own_sinks(config(tmp_path, "run.sinks=[own:dashboard]")):
        sink(stats())
    assert seen == [stats()]
    with pytest.raises(UserError, match=r"run\.sinks: 'own:other' cannot be called as sink\(stats\)"):
        own_sinks(config(tmp_path, "run.sinks=[own:other]"))
    with pytest.raises(UserError, match=r"run\.sinks: 'own:later' is async"):
        own_sinks(config(tmp_path, "run.sinks=[own:later]"))
    with pytest.raises(UserError, match=r"run\.sinks: 'own:dashbord' cannot be found.*Did you mean dashboard"):
        own_sinks(config(tmp_path, "run.sinks=[own:dashbord]"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (5, "0:05"), (59.6, "1:00"), (65, "1:05"), (3599, "59:59"), (3725, "1:02:05"), (360000, "100:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_stopwatch_adds_up_and_says_what_begins():
    begun = []
    watch = Stopwatch(begun.append)
    for _ in range(2):
        with watch("learn"):
            pass
    with watch("score"):
        pass
    assert list(watch.seconds) == ["learn", "score"]
    assert all(0 <= value < 1 for value in watch.seconds.values())
    assert begun == ["learn", "other", "learn", "other", "score", "other"]
