"""A run over two hosts of a real Slurm: preempted, queued again, ended with the bytes of one that was left alone."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rft_cluster.run.ledger import check_run
from tests.integration.hosts import require_namespaces

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PACKAGES = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rft_cluster" / "slurm"
STEPS = 12
# A learner on each host, and the generator beside one of them.
SIZE = ["--nodes=2", "--cpus-per-task=3", "--gpus-per-node=0"]
RUN = ["digits", "learners.cpus=1.9", "generators.cpus=1", "schedule.prompts_per_step=6", "optimizer.warmup_steps=2",
       "data.validation=0", "data.test=20", "schedule.evaluate_every=0", "schedule.stop_when_stuck=0"]  # fmt: skip


@dataclass(frozen=True)
class Slurm:
    enter: list[str]
    shared: Path

    def __call__(self, *command: str) -> str:
        """What a command on the controller prints, in the project's folder."""
        line = f"export PATH=/usr/sbin:/usr/bin:/sbin:/bin; cd {ROOT} && {shlex.join(command)}"
        done = subprocess.run(
            [*self.enter, "bash", "-c", line], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, name: str, *overrides: str) -> int:
        words = [f"run.folder={self.shared}", f"run.name={name}", *overrides]
        options = ["--parsable", f"--output={self.shared}/{name}.txt", *SIZE]
        return int(self("sbatch", *options, "deploy/slurm/rft.sbatch", *RUN, *words))

    def state(self, job: int) -> str:
        return re.search(r"JobState=(\w+)", self("scontrol", "show", "job", str(job)))[1]

    def log(self, name: str) -> str:
        file = self.shared / f"{name}.txt"
        return file.read_text() if file.exists() else ""

    def steps(self, name: str) -> int:
        file = self.shared / name / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def until(self, condition: Callable[[], object], name: str, what: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            told = [file.read_text()[-2000:] for file in ROOT.glob("slurm-*-n?.txt")]
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.log(name)}\n{told}"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    require_namespaces()
    PACKAGES.mkdir(parents=True, exist_ok=True)
    shared = tmp_path_factory.mktemp("shared")
    command = ["bash", Path(__file__).parent / "two_hosts.sh", PACKAGES, ROOT, shared]
    hosts = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = hosts.stdout.readline()
        assert said == "ready\n", said + hosts.stdout.read()
        first = int(Path(f"/proc/{hosts.pid}/task/{hosts.pid}/children").read_text().split()[0])
        entered = ["--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd=/"]
        yield Slurm(["nsenter", f"--target={first}", *entered], shared)
    finally:
        hosts.kill()  # everything in the namespaces ends with it
        hosts.wait(timeout=30)
        for file in ROOT.glob("slurm-*-n?.txt"):
            file.unlink()


def test_a_preempted_run_goes_on_over_both_hosts_and_ends_as_if_nothing_had_been(slurm: Slurm):
    job = slurm.submit("preempted", f"schedule.steps={STEPS}")
    slurm.until(lambda: slurm.steps("preempted") >= 4, "preempted", "the fourth step")
    urgent = slurm(
        "sbatch", "--parsable", "-p", "high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    )
    slurm.until(lambda: slurm.state(job) == "PENDING", "preempted", "queued again")
    before = slurm.steps("preempted")
    assert before < STEPS
    assert "told to stop" in slurm.log("preempted")
    assert f"interrupted: step {before} is saved" in slurm.log("preempted")
    slurm.until(lambda: slurm.state(int(urgent)) == "COMPLETED", "preempted", "the urgent job")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # a job that is queued again waits for two minutes
    slurm.until(lambda: slurm.state(job) == "COMPLETED", "preempted", "the end")
    log = slurm.log("preempted")
    print(log)
    assert re.search(r"start 1, on n1 n2.*start 2, on n1 n2", log, re.DOTALL)
    placed = re.findall(r"^  10\.77\.0\.[23]: (.*learner.*)$", log, re.MULTILINE)
    assert len(placed) >= 4 and all(line.count("learner-") == 1 for line in placed), "one on each host, both times"
    whole = slurm.submit("whole", f"schedule.steps={STEPS}")
    slurm.until(lambda: slurm.state(whole) == "COMPLETED", "whole", "the end")
    weights = [(slurm.shared / name / "model" / "model.safetensors").read_bytes() for name in ("preempted", "whole")]
    assert weights[0] == weights[1]
    ledger = check_run(slurm.shared / "preempted")
    assert (ledger.problems, ledger.state, ledger.steps) == ((), "done", STEPS)


def test_a_cancelled_job_is_not_queued_again(slurm: Slurm):
    """Its driver has the exit code of a preempted one's, since it is stopped before its actors are."""
    job = slurm.submit("cancelled", f"schedule.steps={STEPS}")
    slurm.until(lambda: "start 1, on" in slurm.log("cancelled"), "cancelled", "the start")
    slurm("scancel", str(job))
    slurm.until(lambda: "the driver ended" in slurm.log("cancelled"), "cancelled", "the driver's end", 90)
    assert "exit code 143" in slurm.log("cancelled")
    slurm.until(lambda: slurm("squeue", "--noheader", f"--jobs={job}") == "", "cancelled", "out of the queue", 90)
    assert slurm.state(job) == "CANCELLED"
