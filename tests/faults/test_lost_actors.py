"""Actors that are killed or frozen in a phase of their work: the run goes on by itself, to the same end.

That nothing was generated twice is seen at the journal: a step that is in it at the fault is not written again.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.damage import flip_bit
from tests.faults.launched import Launch, check_records, command, has_done, journal, start, trained, written_again
from tests.faults.table import Row
from tests.faults.victims import (
    ANY,
    BACKWARD,
    GENERATING,
    IDLE_ENGINE,
    LOADING_WEIGHTS,
    TAKING_PROMPTS,
    UPDATING,
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
    snapshots: bool = False
    """True: the learners' state is in memory, too."""

    @property
    def overrides(self) -> Sequence[str]:
        return [f"cluster.snapshot_every={int(self.snapshots)}", *([] if self.kills else ["cluster.step_timeout=25"])]


LOSSES = [
    # A run of twelve steps may end before a phase is met that is sought from step 6 on. A learner is struck late, for
    # there to be a checkpoint and steps since.
    Loss(1, "generator killed, idle", "generator", IDLE_ENGINE, after=2),
    Loss(2, "generator killed while it generates", "generator", GENERATING, after=2),
    Loss(3, "generator killed in a weight update", "generator", LOADING_WEIGHTS, after=2),
    Loss(4, "generator frozen while it generates", "generator", GENERATING, kills=False, after=2),
    Loss(7, "learner killed in the backward pass", "learner-0", BACKWARD),
    Loss(8, "one of two ranks killed", "learner-1", UPDATING),
    Loss(8, "one of two ranks killed, with snapshots", "learner-1", UPDATING, snapshots=True),
    Loss(9, "learner frozen in the backward pass", "learner-1", BACKWARD, kills=False),
    Loss(10, "reward actor killed", "reward", ANY),
]
IN_CI = (2, 7)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, marks=pytest.mark.slow if loss.number in IN_CI else (), id=loss.fault) for loss in LOSSES],
)
def test_a_lost_actor_costs_nothing(undisturbed, tmp_path, tiny_model, loss):
    launch = start(command(tmp_path, "mine", tiny_model, *loss.overrides), tmp_path / "mine")
    launch.until(has_done(loss.after), f"step {loss.after}")
    victim = freeze(launch, loss.actor, loss.phase)
    found, lost, warning = survives(launch, victim.kill if loss.kills else lambda: None)
    assert not victim.process.is_running(), "a frozen process is ended, too"
    # Of two learners the other one sees no more than a closed connection, and must not be blamed. (If one is frozen,
    # both are late: the other waits for it in a collective.)
    assert warning.startswith(victim.name) if loss.kills else victim.name in warning, warning
    pid = victim.process.pid
    cause = rf"its process \({pid} on .* was killed, or crashed" if loss.kills else "no answer to '.*' within"
    assert re.search(cause, warning), warning
    assert launch.text().count("Ray started here") == 1, "the others stayed"
    assert ("the learners go on after step" in launch.text()) == loss.snapshots
    ends_as_if_undisturbed(launch, undisturbed)
    Row(loss.number, loss.fault, victim.phase, found, lost, ledger=True, exact=True).write()


@pytest.mark.timeout(900)
def test_a_byte_that_changes_on_its_way_to_a_generator_is_not_served(undisturbed, tmp_path, tiny_model):
    launch = start(command(tmp_path, "mine", tiny_model), tmp_path / "mine")
    launch.until(has_done(6), "step 6")
    # It has loaded the weights, and its own digests come behind the prompts; the learners' are made in a second.
    victim = freeze(launch, "generator", TAKING_PROMPTS)
    time.sleep(1)
    found, lost, warning = survives(launch, lambda: (flip_in_memory(launch), victim.process.resume()))
    assert "arrived with other bytes" in warning or "received other weights" in warning
    ends_as_if_undisturbed(launch, undisturbed)
    Row(6, "a byte of the weights changed on its way", victim.phase, found, lost, ledger=True, exact=True).write()


def flip_in_memory(launch: Launch) -> None:
    """Change a byte of the memory in which the learners have published their weights."""
    descriptors = Path(f"/proc/{launch.actors()['learner-0']}/fd").iterdir()
    memory = next(file for file in descriptors if "rft_cluster_weights" in os.readlink(file))
    with memory.open("r+b") as file:
        flip_bit(file, os.fstat(file.fileno()).st_size // 2)


@pytest.mark.timeout(900)
def test_what_is_lost_again_and_again_ends_the_run_within_its_budget(undisturbed, tmp_path, tiny_model):
    run = tmp_path / "mine"
    launch = start(command(tmp_path, "mine", tiny_model, "cluster.restarts=2"), run)
    launch.until(has_done(6), "step 6")
    began, killed = time.monotonic(), set()
    while launch.process.poll() is None:
        assert time.monotonic() < began + 240, f"not within 240 s\n{launch.text()}"
        launch.processes()
        for name, pid in launch.actors().items():
            if name.startswith("generator") and pid not in killed:
                psutil.Process(pid).kill()
                killed.add(pid)
        time.sleep(0.2)
    lasted = time.monotonic() - began
    launch.ends(3, 0)
    assert len(killed) >= 3
    *_, line, cure = launch.text().splitlines()
    assert line.startswith("error: generator")
    assert " is saved; go on with: " in cure
    ends_as_if_undisturbed(start(launch.cure(), run), undisturbed)
    Row(5, "all generators gone, again and again", "as soon as they live", lasted, ledger=True, exact=True).write()


def survives(launch: Launch, strike: Callable[[], object]) -> tuple[float, float, str]:
    """Strike, and see that the run goes on by itself.

    Returns the seconds until it says so, the seconds until a new step, and its words.
    """
    done, warnings, written = launch.steps(), len(said(launch)), journal(launch.run)
    struck = time.monotonic()
    strike()
    launch.until(lambda launch: len(said(launch)) > warnings, "the loss was found")
    found = time.monotonic() - struck
    launch.until(has_done(done + 1), "the next step")
    lost = time.monotonic() - struck
    print(f"found after {found:.1f} s, the next new step after {lost:.1f} s")
    assert not written_again(written, launch.run)
    return found, lost, said(launch)[warnings]


def said(launch: Launch) -> list[str]:
    return re.findall("^WARNING: (.*)", launch.text(), re.MULTILINE)


def ends_as_if_undisturbed(launch: Launch, undisturbed: Path) -> None:
    launch.ends(0)
    check_records(launch.run)
    assert trained(launch.run) == trained(undisturbed)


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
    ends_as_if_undisturbed(start(launch.cure(), run), undisturbed)
    assert not written_again(written, run)
    Row(5, "learner killed, no restarts allowed", victim.phase, ledger=True, exact=True).write()
