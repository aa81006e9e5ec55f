"""Messages for the user when Ray cannot be joined or started."""

import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from ray.exceptions import AuthenticationError, RayError

from rft_cluster.cluster import DASHBOARD_LIMIT, start
from rft_cluster.common.errors import Unavailable, UserError
from rft_cluster.config import ClusterSection

# What Ray's core writes to standard error, and what it raises.
CORE = "[gcs_client.cc:1] Failed to get cluster ID from GCS server: InvalidAuthToken: Authentication token is missing\n"
NO_TOKEN = "Token authentication is enabled but no authentication token was found"


@pytest.fixture
def address():
    """Something listens there, as a cluster would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "127.0.0.1:" + str(server.getsockname()[1])


def failing(monkeypatch, error: Exception, said: str = "", cause: Exception | None = None) -> None:
    def init(**_: object) -> None:
        os.write(2, said.encode() * 30)
        raise error from cause

    monkeypatch.setattr(start.ray, "init", init)


def refusal(address: str | None) -> str:
    with pytest.raises(UserError) as caught:
        start.connect(ClusterSection(device="cpu", address=address), 1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "said", "cause"),
    [
        (ConnectionError("Failed to connect"), CORE, RuntimeError("Failed to connect to GCS")),
        (ConnectionError("Failed to connect"), "", RuntimeError("Unauthenticated: wrong token")),
        (AuthenticationError(NO_TOKEN), "", None),
        (RuntimeError(NO_TOKEN), "", None),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_named_once(monkeypatch, capfd, address, error, said, cause):
    failing(monkeypatch, error, said, cause)
    message = refusal(address)
    assert message.startswith(f"the Ray cluster at {address} asks for a token")
    assert "export RAY_AUTH_MODE=token" in message
    assert "~/.ray/auth_token" in message
    assert capfd.readouterr().err == "", "what Ray repeats is not shown"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Failed to connect"),
        RuntimeError("Version mismatch: The cluster was started with Ray: 2.9"),
        ValueError("_node_name cannot be configured"),
        RayError("something of Ray's"),
    ],
)
@pytest.mark.parametrize("cause", [None, RuntimeError("the reason below")])
def test_another_reason_is_given_as_ray_gives_it(monkeypatch, capfd, address, error, cause):
    failing(monkeypatch, error, "lines of the core\n", cause)
    message = refusal(address)
    assert message.startswith(f"the Ray cluster at {address} cannot be joined: {error}")
    assert cause is None or "the reason below" in message
    os.write(2, b"after")
    assert capfd.readouterr().err == "after", "standard error is itself again"


@pytest.mark.parametrize("error", [RuntimeError("timed out"), TimeoutError("timed out"), ConnectionError("timed out")])
def test_ray_that_does_not_start_here_names_its_logs(monkeypatch, error):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failing(monkeypatch, error)
    message = refusal(None)
    assert message.startswith("Ray could not start on this machine: timed out")
    assert "session_latest/logs" in message


def test_a_dashboard_that_comes_too_late_is_worth_another_try(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failing(monkeypatch, Exception("\nThe last 20 lines of dashboard.log: \x1b[0mstarting"))  # as Ray raises it
    monkeypatch.setenv(DASHBOARD_LIMIT, "0")
    with pytest.raises(Unavailable, match=r"start the command again\. .*session_latest/logs.*\nThe last 20 lines"):
        start.connect(ClusterSection(device="cpu"), 1)
    monkeypatch.setenv(DASHBOARD_LIMIT, "60")  # one that ends at once would do so again
    message = refusal(None)
    assert message.startswith("Ray could not start on this machine: The last 20 lines") and "again" not in message


def test_the_dashboard_has_more_time_than_ray_gives_it_and_less_than_the_whole_start():
    environment = {name: value for name, value in os.environ.items() if name != DASHBOARD_LIMIT}
    code = "import rft_cluster.launch, rft_cluster.cluster.start; from ray._private import ray_constants; "
    code += "print(ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S)"
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True, env=environment)
    assert 60 < int(said.stdout) < start.ANSWERS_WITHIN


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:6379", "127.0.0.1:port", "ray://127.0.0.1:9"])
def test_an_address_where_nothing_answers(address):
    assert refusal(address).startswith(f"no Ray cluster answers at {address!r}: ")


@pytest.mark.parametrize("error", [KeyError("a defect"), TypeError("a defect")])
def test_a_defect_stays_one(monkeypatch, address, error):
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        start.connect(ClusterSection(device="cpu", address=address), 1)


HANGS = """
import ctypes, signal, sys
from rft_cluster.cluster import start
from rft_cluster.config import ClusterSection

def init(**_):
    print("waits", flush=True)
    ctypes.PyDLL(None).sleep(60)  # as in Ray's core: Python has no turn

start.ray.init, start.ANSWERS_WITHIN = init, 1.0
start.connect(ClusterSection(device="cpu", address=sys.argv[1] or None), 1)
"""


@pytest.mark.parametrize("joins", [True, False])
def test_ray_that_never_answers_does_not_hold_a_command_for_ever(address, joins):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", HANGS, address if joins else ""]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "waits\n")
    assert ended.stderr.startswith("error: Ray has not answered within 1 s: start the command again.")


def test_whoever_watches_ends_with_the_wait():
    before = {*psutil.Process().children(recursive=True)}
    with start._ended_after(60.0):
        watching = {*psutil.Process().children(recursive=True)} - before
    assert watching and not any(one.is_running() for one in watching)
