"""Actors that are killed or frozen in a phase of their work: the run goes on by itself, to the same end.

That nothing was generated twice is seen at the journal: a step that is in it at the fault is not written again.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.faults.launched import Launch, check_records, command, finish, has_done, journal, start, trained
from tests.faults.table import Row
from tests.faults.victims import (
    ANY,
    BACKWARD,
    GENERATING,
    IDLE_ENGINE,
    LOADING_WEIGHTS,
    SAVING,
    UPDATING,
    Victim,
    freeze,
)


@dataclass(frozen=True)
class Loss:
    number: int
    fault: str
    actor: str
    phase: str
    kills: bool = True
    """False: the actor stays frozen, and is found by its deadline."""
    after: int = 6
    """Steps that are done before."""

    @property
    def overrides(self) -> Sequence[str]:
        return () if self.kills else ("cluster.step_timeout=20",)


LOSSES = [
    Loss(1, "generator killed, idle", "generator", IDLE_ENGINE),
    Loss(2, "generator killed while it generates", "generator", GENERATING),
    Loss(3, "generator killed in a weight update", "generator", LOADING_WEIGHTS, after=2),
    Loss(4, "generator frozen while it generates", "generator", GENERATING, kills=False),
    Loss(7, "learner killed in the backward pass", "learner-0", BACKWARD),
    Loss(8, "one of two ranks killed", "learner-1", UPDATING),
    Loss(9, "learner frozen in the backward pass", "learner-1", BACKWARD, kills=False),
    Loss(10, "reward actor killed", "reward", ANY),
    Loss(14, "learner killed while it writes a checkpoint", "learner-1", SAVING, after=3),
]
IN_CI = (2, 7)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, marks=pytest.mark.slow if loss.number in IN_CI else (), id=loss.fault) for loss in LOSSES],
)
def test_a_lost_actor_costs_nothing(undisturbed, tmp_path, tiny_model, loss):
    run = tmp_path / "mine"
    launch = start(command(tmp_path, "mine", tiny_model, *loss.overrides), run)
    launch.until(has_done(loss.after), f"step {loss.after}")
    victim = freeze(launch, loss.actor, loss.phase)
    found, lost = survives(launch, victim, loss.kills)
    launch.ends(0)
    check_records(run)
    assert trained(run) == trained(undisturbed)
    Row(loss.number, loss.fault, victim.phase, found, lost, ledger=True, exact=True).write()


def survives(launch: Launch, victim: Victim, kills: bool = True) -> tuple[float, float]:
    """Strike, and see that the run goes on by itself. Returns the seconds until it says so, and until a new step."""
    done, warnings, written = launch.steps(), said(launch), journal(launch.run)
    struck = victim.kill() if kills else time.monotonic()
    launch.until(lambda launch: said(launch) > warnings, "the loss was found")
    found = time.monotonic() - struck
    launch.until(has_done(done + 1), "the next step")
    lost = time.monotonic() - struck
    print(f"found after {found:.1f} s, the next new step after {lost:.1f} s")
    assert not victim.process.is_running(), "a frozen process is ended, too"
    (warning,) = re.findall(r"^WARNING: (.*)", launch.text(), re.MULTILINE)[warnings : warnings + 1]
    # Of two learners the other one sees no more than a closed connection, and must not be blamed.
    assert warning.startswith(victim.name), warning
    cause = rf"its process \({victim.process.pid} on .* was killed, or crashed" if kills else "no answer to '.*' within"
    assert re.search(cause, warning), warning
    assert written.items() <= journal(launch.run).items(), "a step of the journal was written again"
    return found, lost


def said(launch: Launch) -> int:
    return launch.text().count("WARNING: ")


@pytest.mark.timeout(900)
def test_without_restarts_the_loss_is_one_line_with_the_command_to_go_on(undisturbed, tmp_path, tiny_model):
    run = tmp_path / "mine"
    launch = start(command(tmp_path, "mine", tiny_model, "cluster.restarts=0"), run)
    launch.until(has_done(6), "step 6")
    victim = freeze(launch, "learner-0", UPDATING)
    written = journal(run)
    victim.kill()
    launch.ends(3, seconds=120)
    *_, line, cure = launch.text().splitlines()
    assert line.startswith("error: learner-0")
    assert cure.startswith("step 4 is saved; go on with: ")
    finish(launch.cure(), run)
    check_records(run)
    assert written.items() <= journal(run).items()
    assert trained(run) == trained(undisturbed)
    Row(7, "learner killed, no restarts allowed", victim.phase, ledger=True, exact=True).write()
