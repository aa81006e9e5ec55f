"""Real runs that are stopped, at every phase and at random moments, and go on by the command that they name."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

STEPS = 12
SHORT = [f"schedule.steps={STEPS}", "schedule.evaluate_every=5", "schedule.save_every=4", "schedule.prompts_per_step=6",
         "optimizer.warmup_steps=2", "data.validation=20", "data.test=20", "schedule.stop_when_stuck=0"]  # fmt: skip
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
GONE = (
    90.0  # seconds until what a killed driver leaves has ended itself: Ray's agents take their time on a busy machine
)


@dataclass
class Launch:
    """A launch that is running; its output is in a file."""

    process: subprocess.Popen
    output: Path
    run: Path

    def text(self) -> str:
        return self.output.read_text()

    def until(self, condition: Callable[["Launch"], bool], what: str) -> None:
        deadline = time.monotonic() + 300
        while not condition(self):
            assert self.process.poll() is None, f"ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"{what}: not within 300 s\n{self.text()}"
            time.sleep(0.01)

    def stop(self, number: signal.Signals) -> None:
        """Send the signal to the driver alone, and see that it ends as it should and leaves nothing."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        code = self.process.wait(timeout=70)
        _, alive = psutil.wait_procs(family, timeout=GONE)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], alive
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
            return
        assert code == 128 + number, self.text()
        assert "Traceback" not in self.text()
        assert "***" not in self.text()
        assert self.text().splitlines()[-1].startswith("interrupted: ")
        assert self.text().count("interrupted: ") == 1

    def cure(self) -> list[str]:
        """The command that the last line names."""
        return shlex.split(self.text().splitlines()[-1].partition("go on with: ")[2])


def command(folder: Path, name: str, model: str) -> list[str]:
    return ["python", "-m", "rft_cluster.launch", "--config", "digits", f"run.folder={folder}", f"run.name={name}",
            f"model.path={model}", *SHORT]  # fmt: skip


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Of a test that fails, too."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()
    STARTED.clear()


def start(words: list[str], run: Path) -> Launch:
    output = run.parent / f"{run.name}-{time.monotonic_ns()}.txt"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words[1:]], stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    STARTED.append(process)
    return Launch(process, output, run)


def finish(words: list[str], run: Path) -> str:
    launch = start(words, run)
    assert launch.process.wait(timeout=400) == 0, launch.text()
    return launch.text()


def trained(run: Path) -> bytes:
    """What must not depend on where the run was stopped."""
    return (run / "model" / "model.safetensors").read_bytes()


def check_records(run: Path) -> None:
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (run / name).read_text().endswith("}\n")
    steps = [line.split(",")[0] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, STEPS + 1)]
    evaluations = (run / "eval.jsonl").read_text().splitlines()
    assert len(evaluations) == 2 + 3  # the test before and after, validation at 5, 10 and the end
    assert not [path for path in run.rglob("*") if path.suffix in (".tmp", ".old") or path.name == ".lock"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model: str) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(command(folder, "whole", tiny_model), folder / "whole")
    check_records(folder / "whole")
    return folder / "whole"


def shows(text: str) -> Callable[[Launch], bool]:
    return lambda launch: text in launch.text()


def is_there(name: str) -> Callable[[Launch], bool]:
    return lambda launch: (launch.run / name).exists()


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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attempt", [*range(3), *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 10))])
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


def actor(launch: Launch, role: str) -> psutil.Process:
    """One of the actors of a role; Ray gives their processes such titles."""
    family = psutil.Process(launch.process.pid).children(recursive=True)
    return next(process for process in family if f"ray::{role}" in "".join(process.cmdline()[:1]))


def ended(launch: Launch, code: int, timeout: float) -> None:
    """See that it ends with this code, without a traceback, and leaves nothing."""
    family = psutil.Process(launch.process.pid).children(recursive=True)
    assert launch.process.wait(timeout) == code, launch.text()
    assert "Traceback" not in launch.text()
    _, alive = psutil.wait_procs(family, timeout=GONE)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], alive


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("role", "number", "said"),
    [
        # Of two learners the other one sees no more than a closed connection, and must not be blamed.
        ("Learner", signal.SIGKILL, r"learner-\d.* died while '\w+': its process \({pid} on .* was killed, or crashed"),
        (
            "Generator",
            signal.SIGKILL,
            r"generator died while '\w+': its process \({pid} on .* was killed, or crashed",
        ),
        (
            "Scorer",
            signal.SIGKILL,
            r"reward \(for generator\) died while 'score': its process \({pid} on .* was killed, or crashed",
        ),
        ("Learner", signal.SIGSTOP, r"learner-\d.*: no answer to '\w+' within 20 s"),
    ],
    ids=["learner", "generator", "reward", "frozen learner"],
)
def test_after_the_loss_of_an_actor_the_run_goes_on_by_itself_to_the_same_end(
    undisturbed, tmp_path, tiny_model, role, number, said
):
    run = tmp_path / "mine"
    timeout = ["cluster.step_timeout=20"] if number == signal.SIGSTOP else []
    launch = start([*command(tmp_path, "mine", tiny_model), *timeout], run)
    launch.until(shows(f"step {7:>2}/12"), "step 7")
    victim = actor(launch, role)
    victim.send_signal(number)
    struck = time.monotonic()
    launch.until(shows("the actors start again (1 of 3"), "the loss was found")
    found = time.monotonic()
    launch.until(shows(f"step {8:>2}/12"), "the next step")
    print(
        f"found after {found - struck:.1f} s, the next new step after {time.monotonic() - struck:.1f} s"
    )  # -rP shows it
    ended(launch, 0, timeout=300)
    assert not victim.is_running(), "a frozen process is ended, too"
    assert re.search(f"WARNING: .*{said.replace('{pid}', str(victim.pid))}", launch.text()), launch.text()
    assert "are in the journal: their completions are not written again" in launch.text()
    check_records(run)
    assert trained(run) == trained(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_restarts_the_loss_is_one_line_with_the_command_to_go_on(undisturbed, tmp_path, tiny_model):
    run = tmp_path / "mine"
    launch = start([*command(tmp_path, "mine", tiny_model), "cluster.restarts=0"], run)
    launch.until(shows(f"step {7:>2}/12"), "step 7")
    actor(launch, "Learner").kill()
    ended(launch, 3, timeout=120)
    *_, said, cure = launch.text().splitlines()
    assert said.startswith("error: learner-")
    assert cure.startswith("step 4 is saved; go on with: ")
    finish(launch.cure(), run)
    check_records(run)
    assert trained(run) == trained(undisturbed)
