"""What the journal is for: the steps that it has are done again from it, whoever would generate them by then."""

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


@pytest.mark.timeout(900)
def test_a_driver_killed_at_the_last_commit_goes_on_without_a_checkpoint(undisturbed, tmp_path, tiny_model):
    run = tmp_path / "mine"
    words = command(tmp_path, "mine", tiny_model, "schedule.save_every=100")
    launch = start(words, run)
    launch.until(is_there(LAST), "the last commit")
    launch.stop(signal.SIGKILL)
    assert not (run / "checkpoints").exists()
    said = finish([*words, *TWO, "--resume"], run)
    assert "steps 1 to 12 are in the journal" in said
    check_records(run)
    assert trained(run) == trained(undisturbed)
    Row(13, "driver killed, others generate afterwards", "at the last commit", ledger=True, exact=True).write()


@pytest.mark.timeout(900)
def test_of_a_generator_killed_while_others_run_ahead_the_journal_alone_leads_to_the_same_end(tmp_path, tiny_model):
    """With `max_staleness: 1` weights change within completions, when they happen to arrive: no two runs are equal."""
    run, ahead = tmp_path / "mine", (*TWO, "schedule.max_staleness=1")
    launch = start(command(tmp_path, "mine", tiny_model, *ahead), run)
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
        finish([*command(tmp_path, name, tiny_model, *ahead), "--resume"], again)
        assert (trained(again) == trained(run)) == (name == "with")
    fault = "one of two generators killed, with `max_staleness: 1`"
    Row(2, fault, victim.phase, found, lost, ledger=True, exact=True).write()
