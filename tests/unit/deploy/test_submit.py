"""The command line that deploy/submit.sh makes, and how long a job may take to save when it is stopped."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]


def make_commands(folder: Path, mark: str = "") -> None:
    """A `ray` that prints its words, behind a mark of its own, and a `python` that does so for the metadata."""
    folder.mkdir(parents=True)
    metadata = f'case "$1" in *job_metadata.py) shift; printf "{mark}{{%s}}" "$*";; esac'
    for name, text in (("ray", f'printf "{mark}%s\\n" "$@"'), ("python", metadata)):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def submit(folder: Path) -> list[str]:
    """The words that reach `ray`. The upload is checked in test_upload.py."""
    (folder / "my project" / "deploy").mkdir(parents=True, exist_ok=True)
    script = shutil.copy(ROOT / "deploy" / "submit.sh", folder / "my project" / "deploy")
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "RFT_RUNS": "/runs", "RFT_SUBMIT": "--no-wait"}
    command = ["bash", script, "digits", "run.name=a b"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def submitted(tmp_path: Path) -> list[str]:
    make_commands(tmp_path / "bin")
    return submit(tmp_path)


def test_this_folders_own_ray_and_python_come_before_those_on_the_path(tmp_path: Path):
    """Another version of Ray may be the first there, and its Python may lack the packages."""
    make_commands(tmp_path / "bin", "other ")
    assert submit(tmp_path)[0] == "other job"
    make_commands(tmp_path / "my project" / ".venv" / "bin", "own ")
    words = submit(tmp_path)
    assert words[0] == "own job" and "own own {digits run.name=a b}" in words


def test_the_same_command_goes_on_with_a_run(submitted: list[str]):
    driver = submitted[submitted.index("--") + 1 :]
    assert driver[:3] == ["python", "-m", "rft_cluster.launch"]
    assert driver[3:] == ["--config", "digits", "--resume=auto", "run.folder=/runs", "cluster.address=auto",
                          "cluster.grace_seconds=70", "run.name=a b"]  # fmt: skip


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
    """Ray must not kill it before."""
    variables = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["env_vars"]
    for file in ("submit.sh", "kuberay/one_gpu.yaml"):
        (grace,) = re.findall(r"cluster\.grace_seconds=(\d+)", (ROOT / "deploy" / file).read_text())
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > int(grace) > 60
