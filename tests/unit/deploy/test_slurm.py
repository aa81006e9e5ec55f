"""deploy/slurm/rft.sbatch with commands of Slurm that answer as told: when a job is queued again, and what it says.

tests/slurm runs it on a real Slurm.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "slurm" / "rft.sbatch"
JOB = "4321"
COMMANDS = {
    "scontrol": 'case $1 in show) printf "n1\\nn2\\n" ;; *) echo "$@" >>asked.txt ;; esac',
    "squeue": 'echo "$STATE"',
    # A node's Ray lasts until it is told to end.
    "srun": 'case "$*" in *" ray --"*) exec sleep 60 ;; esac',
    "python": 'stat -c %a ~/.rft-token-* >mode.txt; cat ~/.rft-token-* >token.txt; echo "$RAY_AUTH_TOKEN" >own.txt\n'
    'echo "$@" >driver.txt; exit "$CODE"',
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    (commands / "activate").write_text("PATH=$PWD/.venv/bin:$PATH\n")
    (tmp_path / "home").mkdir()
    return tmp_path


def run(project: Path, code: int, restarts: int = 0, state: str = "RUNNING") -> tuple[bool, str]:
    """Whether the job is queued again after its driver's end with `code`, and its log."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(project / "home"), "CODE": str(code), "STATE": state}
    environment |= {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_CPUS_PER_TASK": "4", "SLURM_RESTART_COUNT": str(restarts)}
    command = ["bash", SCRIPT, "digits", "run.name=mine"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (code, "")
    asked = project / "asked.txt"
    assert not asked.exists() or asked.read_text() == f"requeue {JOB}\n"
    return asked.exists(), done.stdout


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (3, 0, True), (3, 4, True), (3, 5, False), (143, 5, True),
     (143, 99, True), (143, 100, False)],
)  # fmt: skip
def test_a_job_is_queued_again_where_that_may_help_and_not_forever(project, code: int, restarts: int, again: bool):
    """A start that lacks a part holds all nodes while it waits for them."""
    assert run(project, code, restarts)[0] == again


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_was_cancelled_stays_so(project, state: str):
    assert not run(project, 143, state=state)[0]


def test_the_driver_waits_for_both_nodes(project):
    run(project, 0)
    driver = (project / "driver.txt").read_text().split()
    assert driver[:5] == ["deploy/when_ready.py", "2", "python", "-m", "rft_cluster.launch"]
    assert driver[5:] == ["--config", "digits", "--resume=auto", f"cluster.address=n1:{20000 + 2 * int(JOB)}",
                          "cluster.grace_seconds=540", "run.name=mine"]  # fmt: skip
    (signal,) = re.findall(r"--signal=B:TERM@(\d+)", SCRIPT.read_text())
    assert int(signal) > 540


def test_the_token_is_in_a_file_of_the_users_alone_while_ray_runs(project):
    _, log = run(project, 0)
    port, host, file = re.search(r"ssh -L 8265:127\.0\.0\.1:(\d+) (\S+), .* token in (\S+)", log).groups()
    assert (int(port), host) == (20001 + 2 * int(JOB), "n1")
    assert Path(file).parent == project / "home" and not Path(file).exists()
    assert (project / "mode.txt").read_text() == "600\n"
    assert (project / "token.txt").read_text() == (project / "own.txt").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}\n", (project / "own.txt").read_text())


def test_a_job_has_its_nodes_memory_as_it_has_their_cpus():
    """`--exclusive` alone gives the memory of the site's default."""
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--exclusive", "--mem=0"} <= set(options)
