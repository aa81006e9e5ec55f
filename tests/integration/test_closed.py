"""The classifier's features together, for real: a closed question with own options, further prompts, a class that is
never shown, another data set, and what is asked of the policy afterwards. Ray, vLLM and FSDP2."""

import json
from pathlib import Path

import pytest

from rft_cluster.data import load_dataset
from rft_cluster.run.answers import ALSO, read_answers
from rft_cluster.run.ledger import check_run
from rft_cluster.run.resume import read_saved_config
from tests.integration.test_launch import command, rows

STEPS, TEST = 6, 100


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    words = [f"run.folder={folder}", "run.name=mine", f"schedule.steps={STEPS}", "optimizer.warmup_steps=2",
             "schedule.evaluate_every=0", "schedule.min_live=0.9", "prompt.template=closed",
             "prompt.options=own_top_k", "prompt.top_k=3", "data.unseen_classes=[nine]", "data.validation=60",
             f"data.test={TEST}", "baselines=[base_closed]", "evaluation.also.source=digits",
             "evaluation.also.subject=digit", "evaluation.also.test=30"]  # fmt: skip
    done = command("launch", "--config", "digits", *words)
    assert done.returncode == 0, done.stderr
    return folder / "mine"


@pytest.mark.slow
def test_training_shows_own_options_and_asks_for_more_where_groups_are_alike(run):
    images = json.loads((run / "options.json").read_text())["images"]
    assert len(images) == 36, "of nine classes, four images each"
    for one in images.values():
        assert len(one["options"]) == 3 and one["label"] in one["options"] and "nine" not in one["options"]
    groups = [(row["groups"], row["live_groups"]) for row in rows(run / "metrics.jsonl")]
    assert len(groups) == STEPS and max(groups)[0] > 20
    assert all(count > 20 or live >= 0.9 for count, live in groups)
    ledger = check_run(run)
    assert (ledger.problems, ledger.state) == ((), "done")


@pytest.mark.slow
def test_what_was_shown_is_learned_and_what_was_not_is_told_apart(run):
    before, after = (read_answers(run, step, "test") for step in (0, STEPS))
    assert len(after) == TEST and "nine" in {one.label for one in after}
    right = [sum(one.strict for one in judged if one.label != "nine") for judged in (before, after)]
    assert right[1] > 2 * right[0], right
    assert [len(read_answers(run, step, ALSO)) for step in (0, STEPS)] == [30, 30]
    baselines = json.loads((run / "baselines.json").read_text())
    seen = [one for one in before if one.label != "nine"]
    assert baselines["right"]["base_closed"] == "".join("01"[one.strict] for one in seen)


@pytest.mark.slow
def test_it_is_asked_in_other_orders_and_a_second_time(run, tmp_path):
    done = command("evaluate", "--checkpoint", run, "--votes", "2", "--orders", "2", "--second-look", "3",
                   "--output", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["greedy"]["strict"]["right"] == sum(one.strict for one in read_answers(run, STEPS, "test"))
    assert len(found["orders"]["strict"]) == 2 and 0 < found["orders"]["same"] <= 1
    assert found["seen"]["n"] + found["unseen"]["n"] == TEST
    assert found["second_look"]["strict"]["n"] == TEST
    assert found["second_look"]["in_options"]["right"] >= found["second_look"]["strict"]["right"]
    assert (
        found["probabilities"]["temperature"]
        == json.loads((run / "calibration.json").read_text())["models"]["model"]["temperature"]
    )


@pytest.mark.slow
def test_a_prediction_is_the_most_probable_class_and_says_on_what_it_was_calibrated(run, tmp_path):
    config = read_saved_config(run / "config.yaml")
    dataset = load_dataset(config.data, config.run.seed)
    for number, example in enumerate(dataset.test[:20]):
        (tmp_path / f"{number:02d}.png").write_bytes(dataset.image(example))
    done = command("predict", "--checkpoint", run, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert "validation images of the classes that were trained" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 20
    for line in lines:
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
