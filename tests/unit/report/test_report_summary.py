import dataclasses

import pytest

from rft_cluster.classification.report import Judged
from rft_cluster.report import summary
from rft_cluster.report.charts import curves
from rft_cluster.report.evaluations import by_class, ends, kept
from rft_cluster.run.figures import thinned
from rft_cluster.run.history import read_history
from tests.unit.report.whole import written


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return read_history(written(tmp_path_factory.mktemp("summary")))


def evaluation(step: int, split: str, rate: float) -> dict:
    return {"step": step, "split": split, "accuracy_strict": rate, "interval": [rate, rate], "n": 4}


def judged(name: str, label: str, predicted: str | None) -> Judged:
    return Judged(name, label, "", predicted, label == predicted, False, True)


def test_before_after_baselines_and_chance(history):
    with_baselines = dataclasses.replace(history, baselines={"nearest_neighbour": 0.5})
    rows = summary.accuracies(with_baselines, 2)
    assert rows[2]["interval"] is None  # of an earlier version
    measured = dataclasses.replace(with_baselines, right={"nearest_neighbour": (True, True, False, False)})
    assert summary.accuracies(measured, 2)[2]["interval"] == pytest.approx([0.15, 0.85], abs=0.01)  # Wilson's
    assert [(row["kind"], row["name"], row["rate"]) for row in rows] == [
        ("before", "Before training", 0.5),
        ("after", "After 2 steps", 1.0),
        ("baseline", "1-nearest neighbour on pixels", 0.5),
        ("chance", "Chance", 0.5),
    ]
    assert rows[1]["interval"][0] == pytest.approx(0.51, abs=0.01)


def test_unseen_classes_have_a_row_of_their_own(history):
    manifest = {**history.manifest, "splits": {**history.manifest["splits"]}}
    manifest["splits"]["train"] = manifest["splits"]["train"][:1]  # of the first of two classes
    rows = summary.accuracies(dataclasses.replace(history, manifest=manifest), 2)
    assert [(row["name"], row["n"]) for row in rows if row["kind"] == "part"] == [
        ("Seen classes", 2),
        ("Unseen classes", 2),
    ]


def test_without_test_images_validation_is_shown():
    validation = tuple(evaluation(step, "validation", step / 100) for step in (20, 40, 60))
    history = type("History", (), {"evaluations": validation, "baselines": {}, "right": {}})()
    assert [row["name"] for row in summary.accuracies(history, 0)] == ["After 20 steps", "After 60 steps"]
    assert summary.accuracies(type("History", (), {"evaluations": (), "baselines": {}, "right": {}})(), 10) == []


@pytest.mark.parametrize(
    ("state", "said"), [("in progress", "in progress"), ("stopped", "was stopped"), ("done", "Without test images")]
)
def test_without_a_comparison_the_reason_is_said(history, state, said):
    assert said in summary.sentence(dataclasses.replace(history, state=state))


def test_the_verdict_is_that_of_the_run(history):
    right = {"nearest_neighbour": (True, False, False, False), "tower_probe": (True,) * 4}
    done = dataclasses.replace(history, baselines={"nearest_neighbour": 0.25}, right=right, state="done")
    said = summary.sentence(done)
    assert said.startswith("The trained model (100.0 %, interval 51.0 to 100.0) is not clearly better than the best")
    assert "image by image +0.0 points" in said and "+50.0 points" in said  # over the untrained model
    older = dataclasses.replace(done, right={})
    assert summary.sentence(older).startswith("Which images the baselines are right on is not recorded")


def test_the_paired_difference_is_of_the_same_images_only():
    before, after = (
        [judged("a", "rose", None), judged("b", "rose", "rose")],
        [judged("b", "rose", "rose"), judged("a", "rose", "rose")],
    )
    found = summary.difference(before, after)
    assert found is not None and (found["difference"], found["only_second"]) == (0.5, 1)
    assert summary.difference(before, after[:1]) is None and summary.difference([], []) is None


def test_time_by_stage_and_without_the_pause_before_a_resumed_part(history):
    told = summary.times(history)
    assert told["all"] == 60 and told["begun"] == "2026-01-02 03:04:00"
    assert {stage["name"]: stage["seconds"] for stage in told["stages"]} == {
        **{"generate": 4.0, "learn": 3.0, "transfer": 1.0, "everything else": 52.0}
    }
    launch = "$ python -m rft_cluster.launch"
    lines = [("2026-01-02 03:00:00", launch), ("2026-01-02 03:00:10", "step 1"),
             ("2026-01-02 05:00:00", f"{launch} --resume"), ("2026-01-02 05:00:20", "step 2")]  # fmt: skip
    assert summary._clock(lines) == (30.0, "2026-01-02 03:00:00", "2026-01-02 05:00:20")


def test_what_was_survived(history):
    told = summary.faults(dataclasses.replace(history, redone=(3, 4, 4)))
    assert [loss["error"] for loss in told["losses"]] == ["generator died "]
    assert (told["resumed"], told["redone"], told["redone_span"], len(told["warnings"])) == (0, 2, "3 to 4", 1)


def test_each_class_before_and_after_and_what_it_is_taken_for():
    first = [judged("a", "rose", "tulip"), judged("b", "rose", None), judged("c", "tulip", "tulip")]
    last = [judged("a", "rose", "rose"), judged("b", "rose", "tulip"), judged("c", "tulip", None)]
    rose, tulip = by_class(first, last, ["rose", "tulip", "oak"])
    assert (rose["before"]["right"], rose["after"]["right"], rose["answered"]) == (0, 1, 1)
    assert rose["taken_for"] == [("tulip", 1)] and tulip["taken_for"] == [("(no class)", 1)]
    assert by_class([], [], ["rose"]) == []
    assert by_class([], last, ["rose"])[0]["before"] is None


def test_the_ends_are_of_one_split_and_of_the_test_once_a_trained_policy_was_tested():
    rows = [(evaluation(step, split, 0.5), []) for step, split in
            ((0, "test"), (4, "validation"), (8, "validation"), (9, "test"))]  # fmt: skip
    for count, steps in ((0, []), (1, [0]), (2, [4]), (3, [4, 8]), (4, [0, 9])):
        assert [row["step"] for row, _ in ends(rows[:count])] == steps


def test_the_first_best_and_last_of_the_validation_are_kept():
    rows = [
        evaluation(0, "test", 0.1),
        *(evaluation(step, "validation", rate) for step, rate in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.4))),
    ]
    history = type("History", (), {"evaluations": tuple(rows)})()
    assert [(row["step"], row["split"]) for row in kept(history)] == [
        (0, "test"), (1, "validation"), (2, "validation"), (4, "validation")]  # fmt: skip


def test_curves_leave_out_what_never_happened_and_what_is_no_number():
    others = {"reward/format": 1.0, "skipped": 0, "kl": float("inf"), "replayed": True}
    rows = [{"step": step, "reward": step / 10, **others} for step in (1, 2)]
    told = curves(rows)
    assert told["step"] == [1, 2]
    assert {chart["title"]: chart["series"] for chart in told["charts"]} == {
        "Reward": {"reward": [0.1, 0.2], "reward/format": [1.0, 1.0]},
        "KL from the start": {"kl": [None, None]},
    }


def test_a_long_run_has_no_more_points_than_a_page_shows():
    rows = [{"step": step} for step in range(1, 10_001)]
    few = thinned(rows, 100)
    assert len(few) == 100 and (few[0]["step"], few[-1]["step"]) == (1, 10_000)
