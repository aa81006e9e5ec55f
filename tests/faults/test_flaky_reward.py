"""A user's reward that fails in every way: its completions are masked, and the run goes on."""

import json
import re

import pytest

from tests.faults.flaky_reward import KINDS
from tests.faults.launched import check_records, command, start
from tests.faults.table import Row

REASONS = {"raises": "does not like it", "no number": "nan", "hangs": "no answer within", "ends": "its process died"}


@pytest.mark.timeout(600)
def test_a_reward_that_fails_in_every_way_masks_its_completions_and_no_others(tmp_path, tiny_model):
    run = tmp_path / "mine"
    overrides = ["rewards.tests.faults.flaky_reward:brevity=0.1",
                 "scoring.time_limit=1", "scoring.failure_budget=0.5", "scoring.red_team=off"]  # fmt: skip
    launch = start(command(tmp_path, "mine", tiny_model, *overrides), run)
    launch.ends(0)
    check_records(run)
    rewards = [
        reward
        for file in (run / "rollouts").iterdir()
        for line in file.read_text().splitlines()
        for reward in json.loads(line)["rewards"]
    ]
    reasons = [reason for reward in rewards for reason in reward["failures"].values()]
    assert len(rewards) == 12 * 6 * 8
    assert len(reasons) == sum(reward["total"] is None for reward in rewards)
    for kind in KINDS:
        hit = [reason for reason in reasons if re.search(REASONS[kind], reason)]
        assert hit, reasons
        for _ in hit:
            Row(11, f"a reward {kind}" if kind != "no number" else "a reward returns NaN", hit[0], ledger=True).write()
    assert len(reasons) == sum(bool(re.search("|".join(REASONS.values()), reason)) for reason in reasons)
