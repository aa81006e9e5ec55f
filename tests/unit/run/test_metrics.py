import json

import pytest

from rft_cluster.messages import Reward
from rft_cluster.run.metrics import Stopwatch, clock, step_line, step_metrics
from tests.unit.run.steps import GROUPS, LEARNER, REWARDS, SECONDS, completion, group, reward


def test_a_step_by_hand():
    assert step_metrics(GROUPS, REWARDS, LEARNER, SECONDS) == pytest.approx(
        {
            "reward": 0.75,  # (1 + 2 + 0 + 0) / 4
            "reward/format": 0.5,
            "reward/accuracy": 0.25,
            "reward_failures": 0,
            "live_groups": 0.5,
            "logprob_gap": 0.05,  # 0.4 / 8 tokens, as the next four
            "kl": 0.1,
            "entropy": 2.0,
            "importance": 1.0,
            "clipped": 0.25,
            "loss": -0.5,
            "grad_norm": 1.5,
            "learning_rate": 1e-4,
            "skipped": 0.0,
            "completion_tokens": 4.0,  # (3 + 5 + 4 + 4) / 4
            "cut_short": 0.25,
            "oldest_version": 6,
            "tokens": 16,
            "tokens_trained": 8.0,
            "tokens_per_second": 4.0,  # 16 / (2 + 0 + 1.5 + 0.5)
            "seconds/generate": 2.0,
            "seconds/score": 0.0,
            "seconds/learn": 1.5,
            "seconds/transfer": 0.5,
        }
    )


def test_a_step_without_an_update_has_no_learner_figures():
    metrics = step_metrics(GROUPS, REWARDS, {}, SECONDS)
    assert metrics["tokens_trained"] == 0
    assert metrics["reward"] == 0.75
    assert not {"logprob_gap", "kl", "loss", "learning_rate"} & set(metrics)


# The second group's rewards: one of one's own failed on the one, both on the other.
MASKED = [
    REWARDS[0],
    [
        Reward(None, {"format": 1.0}, {"accuracy": "no answer within 10 s"}),
        Reward(None, {}, {"accuracy": "returned nan", "format": "KeyError"}),
    ],
]


def test_masked_completions_are_counted_and_in_no_mean():
    metrics = step_metrics(GROUPS, MASKED, LEARNER, SECONDS)
    assert (metrics["reward"], metrics["reward/format"], metrics["reward/accuracy"]) == (1.5, 1.0, 0.5)
    assert metrics["live_groups"] == 0.5
    failures = {name: value for name, value in metrics.items() if name.startswith("reward_failures")}
    assert failures == {"reward_failures": 2, "reward_failures/accuracy": 2, "reward_failures/format": 1}
    line = step_line(8, 120, metrics, seconds_left=5)
    assert "reward 1.50 (format 1.00 accuracy 0.50; 2 completions without: accuracy 2 format 1 failed)" in line
    assert "without" not in step_line(8, 120, step_metrics(GROUPS, REWARDS, LEARNER, SECONDS), seconds_left=5)


def test_every_figure_is_finite_json():
    for learner in (LEARNER, {}, {**dict.fromkeys(LEARNER, 0.0)}):
        json.dumps(step_metrics(GROUPS, REWARDS, learner, SECONDS), allow_nan=False)


def test_the_line_of_a_step():
    line = step_line(8, 120, step_metrics(GROUPS, REWARDS, LEARNER, SECONDS), seconds_left=3725)
    assert "\n" not in line
    assert line.startswith("step   8/120 ")
    for part in (
        *("reward 0.75", "format 0.50", "accuracy 0.25", "live 0.50", "gap 0.0500", "4 tok/s"),
        *("generate 50%", "score 0%", "learn 38%", "transfer 12%", "1:02:05 left"),  # of 4 s
    ):
        assert part in line


@pytest.mark.parametrize(
    ("cut", "of", "shown"), [(0, 8, ""), (1, 8, "12 %"), (1, 1000, "1 %"), (3, 4, "75 %"), (8, 8, "100 %")]
)
def test_the_line_of_a_step_says_how_many_answers_were_cut(cut, of, shown):
    groups = [group(0, *(completion(3, "length" if i < cut else "stop") for i in range(of)))]
    line = step_line(8, 120, step_metrics(groups, [[reward(1, 0)] * of], LEARNER, SECONDS), seconds_left=5)
    assert (f"  {shown} cut at max_tokens  " in line) if shown else ("cut" not in line)


def test_the_line_of_a_step_without_an_update_says_so():
    line = step_line(8, 120, step_metrics(GROUPS, REWARDS, {}, SECONDS), seconds_left=5)
    assert "no live group: no update" in line
    assert "gap" not in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (5, "0:05"), (59.6, "1:00"), (65, "1:05"), (3599, "59:59"), (3725, "1:02:05"), (360000, "100:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_stopwatch_adds_up():
    watch = Stopwatch()
    for _ in range(2):
        with watch("learn"):
            pass
    with watch("score"):
        pass
    assert list(watch.seconds) == ["learn", "score"]
    assert all(0 <= value < 1 for value in watch.seconds.values())
