from dataclasses import fields, replace

import pytest

from rft_cluster.classification.report import Evaluation
from rft_cluster.run import series
from rft_cluster.run.metrics import StepStats
from rft_cluster.run.series import EVALUATION, OF_A_RUN, PHASE, PHASE_SECONDS, STEP, RunFigures
from tests.unit.run.steps import stats


def by_name(figures: RunFigures) -> dict[str, float]:
    return {f"{one.name}{{{label}}}" if label else one.name: value for (one, label), value in figures.read().items()}


def test_every_figure_of_a_step_is_a_series_of_its_own():
    assert STEP.keys() | {"seconds"} == {field.name for field in fields(StepStats)}
    assert len({one.name for one in OF_A_RUN}) == len(OF_A_RUN)
    assert all(one.meaning and one.unit for one in OF_A_RUN)


def test_a_step_is_shown_as_in_its_row():
    figures, one = RunFigures(), replace(stats(), reward_failures=2, failures={"judge": 2})
    figures.step(one)
    found, row = by_name(figures), one.row()
    assert found["rft_reward"] == row["reward"] and found["rft_kl"] == row["kl"]
    assert found["rft_reward_part{format}"] == row["reward/format"]
    assert found["rft_reward_part_failures{judge}"] == 2
    assert "rft_activation_gib" not in found, "a step without such a figure"


def test_what_counts_adds_up_over_the_steps_and_all_else_is_the_last_one():
    figures = RunFigures()
    for step in (8, 9):
        figures.step(stats(step))
    found = by_name(figures)
    assert (found["rft_tokens"], found["rft_step"], found["rft_skipped_groups"]) == (32, 9, 2)
    assert found["rft_reward"] == 0.75


def test_a_step_from_the_journal_is_shown_and_counts_as_no_more_than_that():
    figures = RunFigures()
    figures.step(replace(stats(), replayed=True, tokens_per_second=None))
    found = by_name(figures)
    assert (found["rft_reward"], found["rft_replayed_steps"]) == (0.75, 1)
    assert "rft_tokens" not in found


def test_the_seconds_of_a_phase_grow_while_it_goes_on(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(series.time, "monotonic", lambda: now[0])
    figures = RunFigures()
    for phase, seconds in (("generate", 2.0), ("other", 0.5), ("learn", 3.0)):
        figures.phase(phase)
        now[0] += seconds
    figures.pass_time()
    values = figures.read()
    assert [values[PHASE_SECONDS, phase] for phase in ("generate", "other", "learn")] == [2.0, 0.5, 3.0]
    assert [values[PHASE, phase] for phase in ("generate", "other", "learn")] == [0, 0, 1]
    now[0] += 1.0
    figures.pass_time()
    assert figures.read()[PHASE_SECONDS, "learn"] == 4.0


def test_an_evaluation_is_shown_by_its_split():
    figures = RunFigures()
    figures.evaluation(Evaluation(4, "validation", 0.5, 0.6, 0.9, 20, (0.3, 0.7)), [])
    values = figures.read()
    assert values[EVALUATION["accuracy_strict"], "validation"] == 0.5
    assert values[EVALUATION["format_rate"], "validation"] == 0.9
