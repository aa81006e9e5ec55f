"""`deploy/submit.sh` against a fresh local head with tokens: a job that succeeds, and one that is stopped."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import BIN, is_alive

ROOT = Path(__file__).parents[2]
PORT = 8299
SHORT = ["schedule.steps=2", "schedule.evaluate_every=0", "schedule.prompts_per_step=4", "optimizer.warmup_steps=1",
         "data.validation=0", "data.test=20"]  # fmt: skip


def session_of(leader: int) -> list[psutil.Process]:
    """All living processes of a session: what its leader started, and what they started."""
    return [process for process in psutil.process_iter() if getsid(process.pid) == leader and is_alive(process.pid)]


def getsid(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:  # it has ended since it was listed
        return None


@pytest.fixture(scope="module")
def head(token_environment: dict[str, str], tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of a user whose Ray head runs here, with a token and the dashboard on loopback."""
    home = tmp_path_factory.mktemp("home")
    environment = token_environment | {
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{PORT}",
        "RFT_RUNS": str(home / "runs"),
    }
    start = [BIN / "ray", "start", "--head", "--block", "--port=6399", f"--dashboard-port={PORT}",
             "--dashboard-host=127.0.0.1", "--num-cpus=2", "--disable-usage-stats",
             "--object-store-memory=200000000"]  # fmt: skip
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        # A head takes jobs a little later than it answers.
        probe = [BIN / "ray", "job", "submit", "--", "true"]
        wait_until(
            lambda: subprocess.run(probe, env=environment, capture_output=True, check=False).returncode == 0, 90, "up"
        )
        yield environment
    finally:
        # Not `ray stop`, which stops every Ray on the machine.
        process.terminate()
        try:
            process.wait(timeout=60)
            wait_until(lambda: not session_of(process.pid), 10, "all processes of the head have ended")
        finally:
            for left in session_of(process.pid):
                left.kill()


def submit(
    environment: dict[str, str], job: str, *overrides: str, options: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "submit.sh", "digits", f"run.name={job}", *SHORT, *overrides],
        env={**environment, "RFT_SUBMIT": f"--submission-id {job} {options}"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def living(environment: dict[str, str]) -> set[str]:
    """The names of the actors that are alive, from the dashboard's own API."""
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/v0/actors?limit=100",
        headers={"Authorization": "Bearer " + Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found = json.load(answer)["data"]["result"]["result"]
    return {actor["name"] for actor in found if actor["name"] and actor["state"] == "ALIVE"}


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(1)


def test_without_the_token_the_dashboard_refuses(head: dict[str, str]):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head['RAY_API_SERVER_ADDRESS']}/api/v0/actors", timeout=20)


def test_a_submitted_job_succeeds_and_shows_its_steps(head: dict[str, str], tiny_model: str):
    result = submit(head, "short", f"model.path={tiny_model}")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Job 'short' succeeded" in result.stdout
    assert "upload: " in result.stderr
    assert "step 1/2" in result.stdout
    assert "step 2/2" in result.stdout
    assert (Path(head["RFT_RUNS"]) / "short" / "model" / "config.json").exists()


def test_stopping_a_job_stops_its_actors(head: dict[str, str], tiny_model: str):
    names = {"learner-0", "learner-1", "generator", "reward"}
    result = submit(head, "long", f"model.path={tiny_model}", "schedule.steps=5000", options="--no-wait")
    assert result.returncode == 0, result.stdout + result.stderr
    wait_until(lambda: names <= living(head), 400, "actors alive")
    stop = [BIN / "ray", "job", "stop", "long"]
    subprocess.run(stop, env=head, check=True, capture_output=True, timeout=60)
    wait_until(lambda: not living(head), 60, "actors gone")
    status = [BIN / "ray", "job", "status", "long"]
    said = subprocess.run(status, env=head, check=True, capture_output=True, text=True, timeout=60)
    assert "stopped" in (said.stdout + said.stderr).lower()


@pytest.mark.slow
def test_a_token_that_is_not_sent_is_told_once_and_the_cure_works(head):
    """Ray's core repeats it many times, and what it raises says only that the connection failed."""
    source = (
        "import sys; from rft_cluster.cluster.start import connect; from rft_cluster.config import ClusterSection\n"
        "from rft_cluster.common.errors import exit_code\n"
        "sys.exit(exit_code(lambda: print(connect(ClusterSection(device='cpu'), 0))))"
    )
    environment = {name: value for name, value in head.items() if name != "RAY_AUTH_MODE"}
    environment["RAY_ADDRESS"] = "127.0.0.1:6399"
    command = [BIN / "python", "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the Ray cluster at 127.0.0.1:6399 asks for a token")
    assert done.stderr.count("\n") == 1
    cure = dict(word.split("=") for word in done.stderr.replace(",", "").split() if word.startswith("RAY_AUTH_MODE="))
    done = subprocess.run(command, env=environment | cure, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
