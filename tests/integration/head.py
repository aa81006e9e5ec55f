"""A Ray head of its own, with a token and its dashboard on loopback, as jobs are submitted to."""

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rft_cluster.cluster import DASHBOARD_LIMIT
from tests.integration.conftest import BIN, is_alive

ROOT = Path(__file__).parents[2]
PORT = 8299
ADDRESS = "127.0.0.1:6399"


def session_of(leader: int) -> list[psutil.Process]:
    """All living processes of a session: what its leader started, and what they started."""
    return [process for process in psutil.process_iter() if getsid(process.pid) == leader and is_alive(process.pid)]


def getsid(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:  # it has ended since it was listed
        return None


@contextmanager
def running_head(token_environment: dict[str, str], home: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """The environment of its user; runs go to `home`/runs."""
    environment = token_environment | {
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{PORT}",
        "RFT_RUNS": str(home / "runs"),
        DASHBOARD_LIMIT: "150",
    }
    start = [BIN / "ray", "start", "--head", "--block", f"--port={ADDRESS.partition(':')[2]}",
             f"--dashboard-port={PORT}", "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}", "--disable-usage-stats",
             "--object-store-memory=200000000",
             '--system-config={"metrics_report_interval_ms": 1000}']  # fmt: skip
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        # A head takes jobs a little later than it answers.
        probe = [BIN / "ray", "job", "submit", "--", "true"]
        wait_until(
            lambda: subprocess.run(probe, env=environment, capture_output=True, check=False).returncode == 0, 300, "up"
        )
        yield environment
    finally:
        # Not `ray stop`, which stops every Ray on the machine.
        process.terminate()
        try:
            process.wait(timeout=60)
            wait_until(lambda: not session_of(process.pid), 60, "all processes of the head have ended")
        finally:
            for left in session_of(process.pid):
                with suppress(psutil.NoSuchProcess):  # it has ended by itself
                    left.kill()


def discovery_file() -> Path:
    """The file of the head in which Ray lists its nodes' ports for Prometheus."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []  # none, if it has ended since it was listed
        if f"--port={PORT}" in words and (folders := [word for word in words if word.startswith("--session-dir=")]):
            return Path(folders[0].partition("=")[2]) / "prom_metrics_service_discovery.json"
    raise AssertionError("no dashboard of the head runs")


def jobs(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the dashboard says of each submitted job, by its submission id."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return {job["submission_id"]: job for job in json.load(answer)}


def submit(environment: dict[str, str], job: str, *overrides: str, options: str = "") -> "subprocess.Popen[str]":
    """`deploy/submit.sh` under way; what it says goes to pipes."""
    return subprocess.Popen(
        [ROOT / "deploy" / "submit.sh", "digits", f"run.name={job}", *overrides],
        env={**environment, "RFT_SUBMIT": f"--submission-id {job} {options}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def actors(environment: dict[str, str]) -> dict[str, str]:
    """The state of each named actor that is not dead and not Ray's own."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    rows = actor_table(environment["RAY_API_SERVER_ADDRESS"], token)
    return {actor["name"]: actor["state"] for actor in rows if actor["state"] != "DEAD"}


def actor_table(dashboard: str, token: str) -> list[dict[str, Any]]:
    """The named actors of a cluster that are not Ray's own, dead ones included, from the dashboard's own API."""
    request = urllib.request.Request(
        f"{dashboard}/api/v0/actors?limit=1000", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found = json.load(answer)["data"]["result"]["result"]
    return [actor for actor in found if actor["name"] and not actor["name"].startswith("_ray_internal")]


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(1)
