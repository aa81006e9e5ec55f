"""What the journal is for: others would write other completions, by rounding at least, and lead to another policy.

Each test is done with the journal and without: without it the weights differ.
"""

import shutil
import signal

import pytest

from tests.faults.damage import only_journal
from tests.faults.launched import check_records, command, finish, has_done, is_there, start, trained
from tests.faults.table import Row
from tests.faults.test_lost_actors import survives
from tests.faults.victims import GENERATING, freeze

TWO = ("generators.count=2", "generators.cpus=0.5")
LAST = "journal/step-000012.jsonl"
both = pytest.mark.parametrize("journalled", [True, False], ids=["with the journal", "without the journal"])


@pytest.mark.timeout(900)
@both
def test_a_driver_killed_at_the_last_commit(undisturbed, tmp_path, tiny_model, journalled):
    """No checkpoint has any step, and two generators go on where one has been."""
    run = tmp_path / "mine"
    words = command(tmp_path, "mine", tiny_model, "schedule.save_every=100")
    launch = start(words, run)
    launch.until(is_there(LAST), "the last commit")
    launch.stop(signal.SIGKILL)
    assert not (run / "checkpoints").exists()
    if not journalled:
        shutil.rmtree(run / "journal")
    said = finish([*words, *TWO, "--resume"], run)
    check_records(run)
    assert ("steps 1 to 12 are in the journal" in said) == journalled
    assert (trained(run) == trained(undisturbed)) == journalled
    if journalled:
        Row(13, "driver killed, other generators go on", "at the last commit", ledger=True, exact=True).write()


@pytest.mark.timeout(900)
def test_a_generator_of_two_killed_while_it_generates(tmp_path, tiny_model):
    """The other one writes what it owed. The journal leads to the same end, and to write anew does not."""
    run = tmp_path / "mine"
    launch = start(command(tmp_path, "mine", tiny_model, *TWO), run)
    launch.until(has_done(5), "step 5")
    victim = freeze(launch, "generator-1", GENERATING)
    found, lost, warning = survives(launch, victim.kill)
    assert warning.startswith("generator-1 died"), warning
    launch.ends(0)
    check_records(run)
    for name in ("with", "without"):
        again = only_journal(run, tmp_path / name)
        if name == "without":
            shutil.rmtree(again / "journal")
        finish([*command(tmp_path, name, tiny_model, *TWO), "--resume"], again)
        assert (trained(again) == trained(run)) == (name == "with")
    Row(2, "one of two generators killed", victim.phase, found, lost, ledger=True, exact=True).write()
