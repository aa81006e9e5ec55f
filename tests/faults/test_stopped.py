"""Real runs that are stopped, at every phase and at random moments, and go on by the command that they name."""

import random
import signal
import time

import pytest

from tests.faults.launched import (
    STEPS,
    check_records,
    command,
    finish,
    is_there,
    shows,
    start,
    trained,
)
from tests.faults.table import Row

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]

# In the order of a run that goes on: each is met by the launch that takes up where the one before was stopped.
PHASES = {
    "reading the data": is_there(".lock"),
    "before the actors": shows("starting the actors"),
    "actors starting": shows("Ray started here"),
    "evaluating before the first step": shows("waiting for nothing more"),
    "in a step": shows("step  2/12"),
    "saving": is_there("checkpoints/step-000008.tmp"),
    "evaluating": shows("step 10/12"),
    "evaluating at the end": shows("step 12/12"),
    "exporting": is_there("model.tmp"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "first",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)],
    ids=lambda number: number.name,
)
def test_stopped_in_every_phase_it_goes_on_by_the_command_it_names(undisturbed, tmp_path, tiny_model, first):
    run = tmp_path / "mine"
    words = command(tmp_path, "mine", tiny_model)
    numbers = [first, *(number for number in (signal.SIGINT, signal.SIGTERM) if number != first)]
    for index, (phase, is_met) in enumerate(PHASES.items()):
        launch = start(words, run)
        launch.until(is_met, phase)
        launch.stop(numbers[index % 2])
        words = launch.cure()
        assert words[-1] == "--resume=auto", "in the first phase there was no run yet"
    finish(words, run)
    check_records(run)
    assert trained(run) == trained(undisturbed)
    for index, phase in enumerate(PHASES):
        Row(17, f"{numbers[index % 2].name} to the driver", phase, ledger=True, exact=True).write()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "attempt",  # CI has the one of SIGKILL: the test above has both other signals
    [pytest.param(number, marks=pytest.mark.long if number != 2 else ()) for number in range(10)],
)
def test_killed_at_a_random_moment_it_ends_as_if_it_had_not_been(undisturbed, tmp_path, tiny_model, attempt):
    chance = random.Random(attempt)
    run = tmp_path / "mine"
    words = command(tmp_path, "mine", tiny_model)
    launch = start(words, run)
    step = chance.randrange(STEPS + 1)
    launch.until(shows(f"step {step:>2}/12" if step else "Ray started here"), f"step {step}")
    time.sleep(chance.uniform(0, 1.5 if step else 25))
    if launch.process.poll() is None:
        launch.stop(SIGNALS[attempt % 3])
    finish([*words, "--resume=auto"], run)
    check_records(run)
    assert trained(run) == trained(undisturbed)
    number = SIGNALS[attempt % 3]
    kind = 13 if number == signal.SIGKILL else 17
    Row(kind, f"{number.name} to the driver", f"at random after step {step}", ledger=True, exact=True).write()
