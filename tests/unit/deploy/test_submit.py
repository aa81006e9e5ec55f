"""The command line that deploy/submit.sh makes, and how long a job may take to save when it is stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rft_cluster.common.stopping import PATIENCE

ROOT = Path(__file__).parents[3]


@pytest.fixture
def submitted(tmp_path: Path) -> list[str]:
    """The words that reach `ray`, here a script that prints them. The upload is checked in test_upload.py."""
    metadata = 'case "$1" in *job_metadata.py) shift; printf "{%s}" "$*";; esac'
    for name, text in (("ray", 'printf "%s\\n" "$@"'), ("python", metadata)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = ["bash", ROOT / "deploy" / "submit.sh", "digits", "run.name=a b"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RFT_RUNS": "/runs", "RFT_SUBMIT": "--no-wait"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_same_command_goes_on_with_a_run(submitted: list[str]):
    driver = submitted[submitted.index("--") + 1 :]
    assert driver[:3] == ["python", "-m", "rft_cluster.launch"]
    assert driver[3:] == ["--config", "digits", "--resume=auto", "run.folder=/runs", "cluster.address=auto",
                          "run.name=a b"]  # fmt: skip


def test_the_driver_stays_on_the_head(submitted: list[str]):
    """Ray pins a driver to the head only if it asks for no resource."""
    assert not [word for word in submitted if word.startswith("--entrypoint")]
    assert {"--no-wait", "--working-dir", "--runtime-env"} <= set(submitted)


def test_the_dashboard_gets_run_configuration_and_commit(submitted: list[str]):
    assert submitted[submitted.index("--metadata-json") + 1] == "{digits run.name=a b}"
    command = [sys.executable, ROOT / "deploy" / "job_metadata.py", "digits", "run.name=first"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout)
    assert (said["run"], said["config"]) == ("first", "digits")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT).stdout
    assert said["commit"] == "none" if not head else head.startswith(said["commit"].removesuffix("+"))
    wrong = subprocess.run([*command[:-1], "run.nam=first"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "run.name" in wrong.stderr


def test_a_job_that_is_stopped_has_time_to_save():
    """It ends itself after `PATIENCE`, whatever happens; Ray must not kill it before."""
    variables = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > PATIENCE
