"""The driver is killed at the last commit: the journal alone, and no checkpoint, has every step."""

import shutil
import signal

import pytest

from tests.faults.launched import check_records, command, finish, is_there, journal, start, trained
from tests.faults.table import Row

LAST = "journal/step-000012.jsonl"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("journalled", [True, False], ids=["with the journal", "without the journal"])
def test_the_journal_alone_leads_to_the_same_end_though_others_would_generate(
    undisturbed, tmp_path, tiny_model, journalled
):
    """Two generators share a step otherwise than one, so completions that they write again differ in rounding."""
    run = tmp_path / "mine"
    words = command(tmp_path, "mine", tiny_model, "schedule.save_every=100")
    launch = start(words, run)
    launch.until(is_there(LAST), "the last commit")
    launch.stop(signal.SIGKILL)
    assert not (run / "checkpoints").exists()
    written = journal(run)
    assert len(written) == 12
    if not journalled:
        shutil.rmtree(run / "journal")
    finish([*words, "generators.count=2", "generators.cpus=0.5", "--resume"], run)
    check_records(run)
    assert (trained(run) == trained(undisturbed)) == journalled
    if journalled:
        assert written.items() <= journal(run).items()
        Row(13, "driver killed, other generators go on", "at the last commit", ledger=True, exact=True).write()
