"""deploy/slurm/rft.sbatch with commands of Slurm that answer as told: when a job is queued again, and what it says.

tests/slurm runs it on a real Slurm.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import ANY

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "slurm" / "rft.sbatch"
JOB = "4321"
COMMANDS = {
    "scontrol": 'case $1 in show) printf "n1\\nn2\\n" ;; *) echo "$@" >>asked.txt ;; esac',
    "squeue": 'case "$*" in *%T*) echo "$STATE" ;; *%l*) echo "$LIMIT" ;; *%A*) echo "$KNOWN" ;; esac',
    # A node's Ray lasts until it is told to end; the head's not always.
    "srun": 'case "$*" in *" ray --head "*) exec /bin/sleep "$HEAD" ;; *" ray --"*) exec /bin/sleep 60 ;; esac',
    "sleep": "exec /bin/sleep 0.1",
    "python": '[ ! "$WAIT" ] || exec "$WAIT" "$@"\n'
    'stat -c %a ~/.rft-token-* >mode.txt; cat ~/.rft-token-* >token.txt; echo "$RAY_AUTH_TOKEN" >own.txt\n'
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


def run(project: Path, code: int, restarts: int = 0, **answers: str) -> tuple[bool, str]:
    """Whether the job is queued again after its driver's end with `code`, and its log."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(project / "home"), "CODE": str(code)}
    environment |= {"STATE": "RUNNING", "LIMIT": "UNLIMITED", "KNOWN": JOB, "HEAD": "60", "WAIT": ""} | answers
    environment |= {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_CPUS_PER_TASK": "4", "SLURM_RESTART_COUNT": str(restarts)}
    command = ["bash", SCRIPT, "digits", "run.name=mine"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == code and (answers.get("WAIT") or not done.stderr), done.stdout + done.stderr
    asked = project / "asked.txt"
    again = asked.exists()
    if again:
        assert asked.read_text() == f"requeue {JOB}\n"
        asked.unlink()
    return again, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "again"),
    [(0, False), (1, False), (2, False), (3, True), (130, False), (134, True), (137, True), (139, True), (143, True)],
)
def test_a_job_is_queued_again_where_that_may_help(project, code: int, again: bool):
    """130 is of someone who wanted an end."""
    assert run(project, code)[0] == again


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, True), (2, False)])
def test_a_head_whose_ray_has_ended_is_lost(project, code: int, again: bool):
    """Ray ends the driver itself then, with 1, a little before its own end is known."""
    assert run(project, code, HEAD="0.4")[0] == again


def test_a_job_is_not_queued_again_forever(project):
    """A start that lacks a part holds all nodes while it waits for them. One that was stopped lacked none."""
    assert [run(project, 143, restarts)[0] for restarts in (5, 99, 100)] == [True, True, False]
    losses = project / f"slurm-{JOB}-losses.txt"
    codes = [3, 137, 3, 139, 143, 3, 3, 134, 3, 3]
    assert [run(project, code, restarts)[0] for restarts, code in enumerate(codes)] == [True] * len(codes)
    assert losses.read_text() == "5\n"
    again, log = run(project, 3, len(codes))
    assert not again and not losses.exists() and "to be queued again" not in log
    assert run(project, 3, 99) == (True, ANY) and run(project, 3, 100) == (False, ANY)


def test_a_run_that_was_lost_says_how_often(project):
    assert "to be queued again, after loss 1 in a row\n" in run(project, 3)[1]
    assert "to be queued again\n" in run(project, 143)[1]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
@pytest.mark.parametrize("code", [3, 143])
def test_a_job_that_was_cancelled_stays_so(project, code: int, state: str):
    assert not run(project, code, STATE=state)[0]
    assert not list(project.glob("slurm-*-losses.txt"))


@pytest.mark.parametrize(
    ("limit", "enough"),
    [("0:30", False), ("9:00", False), ("10:00", False), ("19:59", False), ("20:00", True), ("1:00:00", True),
     ("1-00:00:00", True), ("UNLIMITED", True), ("", True)],
)  # fmt: skip
def test_a_job_that_would_be_told_to_save_at_once_is_refused(project, limit: str, enough: bool):
    """Slurm sends the signal at the start of a job that is shorter than the warning: a hundred useless starts."""
    again, log = run(project, 0 if enough else 2, LIMIT=limit)
    assert not again and (project / "driver.txt").exists() == enough
    assert log.count("error: ") == (not enough)
    if not enough:
        assert log.count("\n") == 1 and f"may take {limit} minutes" in log and "sbatch --time=20" in log


def test_nobody_waits_for_a_head_whose_ray_has_ended(project):
    """With the real script, which waits for a head that is not there."""
    (project / "deploy").symlink_to(SCRIPT.parents[1])
    began = time.monotonic()
    again, log = run(project, 3, HEAD="1", WAIT=sys.executable)
    assert again and time.monotonic() - began < 20, log
    assert re.search(r"error: Ray of a node of n1:\d+ ended before all had joined", log)


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


def test_the_tokens_that_killed_jobs_left_are_removed(project):
    """Of the user's jobs on this cluster that Slurm does not know any more; if Slurm does not answer, none."""
    left = [project / "home" / f".rft-token-{of}" for of in ("here-1", "here-22", "here-222", "there-22", "mine")]
    for file in left:
        file.write_text("old")
    run(project, 0, KNOWN="", SLURM_CLUSTER_NAME="here")
    assert all(file.exists() for file in left)
    run(project, 0, KNOWN=f"22\n{JOB}", SLURM_CLUSTER_NAME="here")
    assert [file.name for file in left if not file.exists()] == [".rft-token-here-1", ".rft-token-here-222"]


def test_a_job_has_its_nodes_memory_as_it_has_their_cpus():
    """`--exclusive` alone gives the memory of the site's default."""
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--exclusive", "--mem=0"} <= set(options)
