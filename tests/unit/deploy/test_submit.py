"""The command line that deploy/submit.sh makes, and how long a job may take to save when it is stopped."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rft_cluster.common import stopping

ROOT = Path(__file__).parents[3]


def make_commands(folder: Path, mark: str = "") -> None:
    """A `ray` that prints its words, behind a mark of its own, and a `python` that does so for the metadata."""
    folder.mkdir(parents=True)
    metadata = f'case "$1" in *job_metadata.py) shift; printf "{mark}{{%s}}" "$*";; esac'
    ray = f'''[ "$1" != job ] || cat "$6" >sent.yaml; printf "{mark}%s\\n" "$@"'''
    for name, text in (("ray", ray), ("python", metadata)):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def attempt(folder: Path, *overrides: str, runs: str = "/runs") -> "subprocess.CompletedProcess[str]":
    """Its standard output has the words that reach `ray`. The upload is checked in test_upload.py."""
    (folder / "my project" / "deploy").mkdir(parents=True, exist_ok=True)
    for name in ("runtime_env.yaml", "submit.sh"):
        script = shutil.copy(ROOT / "deploy" / name, folder / "my project" / "deploy")
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "RFT_RUNS": runs, "RFT_SUBMIT": "--no-wait"}
    command = ["bash", script, "digits", "run.name=a b", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def submit(folder: Path, *overrides: str, runs: str = "/runs") -> list[str]:
    done = attempt(folder, *overrides, runs=runs)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


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


@pytest.mark.parametrize("runs", ["runs", "./runs", "$PWD/runs"])
def test_runs_that_the_next_upload_would_not_find_are_refused(tmp_path: Path, runs: str):
    """A relative folder would be in what Ray unpacks of this upload, and --resume=auto would begin anew."""
    make_commands(tmp_path / "bin")
    for done, named in (
        (attempt(tmp_path, runs=runs), "RFT_RUNS"),
        (attempt(tmp_path, f"run.folder={runs}"), "run.folder"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {named} is {runs}: ") and done.stderr.endswith("begin it with / or ~\n")
    for kept in ("~/mine", "/mine"):
        assert f"run.folder={kept}" in submit(tmp_path, runs=kept)
        assert f"run.folder={kept}" in submit(tmp_path, f"run.folder={kept}", runs=runs)
    assert "run.folder=~/rft_runs" in submit(tmp_path, runs="")


def ends(grace: int, monkeypatch) -> float:
    """Seconds from the signal to the end of a driver, by force if it has to be."""
    for name in ("WHOLE", "PATIENCE"):
        monkeypatch.setattr(stopping, name, 0.0)  # set back after the test
    stopping.grant(grace)
    return stopping.PATIENCE


def test_a_job_that_is_stopped_has_time_to_save(monkeypatch):
    """Ray must not kill it before: the time that it grants, and that the driver takes."""
    variables = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["env_vars"]
    for file, pattern in (("submit.sh", r"grace=(\d+)"), ("kuberay/one_gpu.yaml", r"cluster\.grace_seconds=(\d+)")):
        (grace,) = re.findall(pattern, (ROOT / "deploy" / file).read_text())
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > ends(int(grace), monkeypatch) >= int(grace) == 70


@pytest.mark.parametrize(("words", "grace"), [([], 70), (["cluster.grace_seconds=300"], 300)])
def test_ray_waits_as_long_as_the_driver_was_told(tmp_path: Path, monkeypatch, words: list[str], grace: int):
    make_commands(tmp_path / "bin")
    driver = submit(tmp_path, *words)
    assert [word for word in driver if "grace" in word][-1] == f"cluster.grace_seconds={grace}"
    sent = yaml.safe_load((tmp_path / "my project" / "sent.yaml").read_text())
    ours = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())
    assert int(sent["env_vars"].pop("RAY_JOB_STOP_WAIT_TIME_S")) == grace + 5 > ends(grace, monkeypatch)
    assert int(ours["env_vars"].pop("RAY_JOB_STOP_WAIT_TIME_S")) == 75
    assert sent == ours
    wrong = attempt(tmp_path, "cluster.grace_seconds=1e3")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: cluster.grace_seconds is 1e3: ")
