"""SFT for real: as a warm start and as a baseline, each a run inside a run of GRPO. Ray, vLLM and FSDP2."""

import json
from pathlib import Path

import pytest

from rft_cluster.run.answers import read_answers
from rft_cluster.run.ledger import check_run
from tests.integration.test_launch import command, rows

WARM, STEPS = 20, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    words = [f"run.folder={folder}", "run.name=mine", f"schedule.steps={STEPS}", "optimizer.warmup_steps=2",
             f"schedule.warm_start={{steps: {WARM}}}", "schedule.evaluate_every=0", "baselines=[base,sft]"]  # fmt: skip
    done = command("launch", "--config", "digits", *words)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return folder / "mine"


@pytest.mark.slow
def test_a_few_steps_of_sft_teach_the_digits(run):
    """By chance 10 % are right. As many steps of GRPO reach 68 %."""
    before, after = (row["accuracy_strict"] for row in rows(run / "warm_start/eval.jsonl") if row["split"] == "test")
    assert before < 0.2 and after > 0.6
    losses = [row["loss"] for row in rows(run / "warm_start/metrics.jsonl")]
    assert losses[-1] < 0.3 * losses[0] and all("reward" not in row for row in rows(run / "warm_start/metrics.jsonl"))


@pytest.mark.slow
def test_grpo_starts_from_the_warm_started_policy(run):
    kept = json.loads((run / "warm_start.json").read_text())
    assert kept["kept"] and kept["validation"][1] > kept["validation"][0]
    # The learners loaded the export and sent it to engines: these answer as those that SFT had sent its weights to.
    assert read_answers(run, 0, "test") == read_answers(run / "warm_start", WARM, "test")
    assert rows(run / "metrics.jsonl")[0]["kl"] < 0.01, "the reference is that policy, too"


@pytest.mark.slow
def test_sft_and_the_untouched_model_are_baselines(run):
    record = json.loads((run / "baselines.json").read_text())
    untouched, sft = (read_answers(folder, step, "test")
                      for folder, step in ((run / "warm_start", 0), (run / "baselines/sft", STEPS)))  # fmt: skip
    for name, judged in (("base", untouched), ("sft", sft)):
        assert record["right"][name] == "".join("01"[one.strict] for one in judged)
    # So few steps teach the layout and no class.
    begun = [sum(one.text.startswith("<think></think>") for one in judged) for judged in (untouched, sft)]
    assert begun[0] == 0 and begun[1] > 250


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "warm_start", "baselines/sft"])
def test_no_run_lost_or_repeated_anything(run, folder):
    ledger = check_run(run / folder)
    assert (ledger.problems, ledger.state) == ((), "done")
