"""A soak: 30 actors of one run are killed at random moments. Its journal leads a second run to the same bytes."""

import random
import time

import pytest

from tests.faults.damage import only_journal
from tests.faults.launched import check_records, command, finish, has_done, start, trained
from tests.faults.table import Row
from tests.faults.test_lost_actors import survives
from tests.faults.victims import freeze

FAULTS, STEPS, SEED = 30, 150, 17
NAMES = {"generator": "a generator", "learner": "a learner", "reward": "the reward actor"}
SETTINGS = [f"schedule.steps={STEPS}", "schedule.evaluate_every=0", "schedule.keep_checkpoints=100",
            "generators.count=2", "generators.cpus=0.5", "cluster.restarts=10"]  # fmt: skip


@pytest.mark.timeout(1800)
def test_thirty_losses_at_random_moments_and_the_journal_leads_to_the_same_end(tmp_path, tiny_model):
    chance, run, struck = random.Random(SEED), tmp_path / "mine", list[Row]()
    launch = start(command(tmp_path, "mine", tiny_model, *SETTINGS), run)
    launch.until(has_done(4), "the first checkpoint")
    for number in range(FAULTS):
        time.sleep(chance.uniform(0, 1.5))
        role = chance.choice(list(NAMES))
        names = [name for name in sorted(launch.actors()) if name.startswith(role)]
        victim = freeze(launch, chance.choice(names) if names else role)
        found, lost, _ = survives(launch, victim.kill)
        struck.append(Row(24, f"soak: {NAMES[role]} killed", victim.phase, found, lost, ledger=True, exact=True))
        print(f"fault {number + 1} of {FAULTS}: {victim.name}, step {launch.steps()}")
    launch.ends(0)
    check_records(run, STEPS)

    replayed = only_journal(run, tmp_path / "replayed")
    text = finish([*command(tmp_path, "replayed", tiny_model, *SETTINGS), "generators.count=1", "--resume"], replayed)
    assert f"steps 5 to {STEPS} are in the journal" in text
    assert trained(replayed) == trained(run)
    for row in struck:
        row.write()
