"""Several hosts on one machine, joined by a network.

A host is a set of Linux namespaces: its own network card (10.77.0.1, .2, .3 on one switch), processes, /dev/shm,
/tmp/ray and name. What one process of a host passes to another by /proc is not there on the next host. The files of
the tests are on all of them, as on shared storage. Everything goes when the process that holds a namespace is killed.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import BIN

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
LINK_UP = "ip link set lo up"
START_RAY = [BIN / "ray", "start", "--disable-usage-stats", "--object-store-memory=100000000"]


@dataclass(frozen=True)
class Host:
    address: str
    pid: int  # of its first process, as the machine counts
    ray_folder: Path
    environment: dict[str, str]

    @property
    def enter(self) -> list[str]:
        """The beginning of a command that is executed on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--pid", "--mount", "--uts"]

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.enter, *command], env=self.environment, cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *command: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        process = self.start(*command)
        try:
            output, errors = process.communicate(timeout=seconds)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def must(self, *command: str | Path, seconds: float = 60) -> str:
        result = self.run(*command, seconds=seconds)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    def start_ray(self, *options: str) -> subprocess.Popen[str]:
        """Make this host a node of a cluster. The command ends when Ray runs."""
        return self.start(*START_RAY, f"--node-ip-address={self.address}", *options)

    @property
    def logs(self) -> str:
        """What actors of this host have printed."""
        files = sorted(self.ray_folder.glob("session_2*/logs/worker-*.out"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    @property
    def roles(self) -> set[str]:
        """Classes of all actors that ever ran here, from the head lines of their logs."""
        return set(re.findall(r"^:actor_name:(\w+)$", self.logs, re.MULTILINE))


class Network:
    """A switch, and the hosts that are plugged into it."""

    def __init__(self, stack: ExitStack, folder: Path, environment: dict[str, str]) -> None:
        """`stack` ends the hosts that are there at the end. `folder` gets their files."""
        Path("/tmp/ray").mkdir(exist_ok=True)  # the place where each host mounts its own
        self._stack, self._folder, self._environment = stack, folder, environment
        set_up = f"{LINK_UP}; ip link add switch type bridge; ip link set switch up"
        self._switch = stack.enter_context(namespaces(set_up))

    def add(self, number: int) -> Host:
        folder = self._folder / f"ray-{number}"
        folder.mkdir()
        mounts = f"mount --bind {folder} /tmp/ray; mount -t tmpfs tmpfs /dev/shm; hostname host-{number}"
        pid = self._stack.enter_context(namespaces(f"{LINK_UP}; {mounts}"))
        host = Host(f"{NETWORK}.{number}", pid, folder, self._environment)
        self._at_switch(f"ip link add port-{number} type veth peer name eth0 netns {pid}")
        self._at_switch(f"ip link set port-{number} master switch up")
        host.must("ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        host.must("ip", "link", "set", "eth0", "up")
        return host

    def unplug(self, host: Host) -> None:
        """No packet passes between this host and others. Its processes live on."""
        self._at_switch(f"ip link set {_port(host)} down")

    def plug_in(self, host: Host) -> None:
        self._at_switch(f"ip link set {_port(host)} up")

    def _at_switch(self, command: str) -> None:
        subprocess.run(["nsenter", f"--target={self._switch}", "--net", "sh", "-ec", command], check=True, timeout=30)


def _port(host: Host) -> str:
    return f"port-{host.address.rpartition('.')[2]}"


def require_namespaces() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (package iproute2)")
    probe = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces are not permitted here: {tried.stderr.strip()}")


@contextmanager
def namespaces(set_up: str) -> Iterator[int]:
    """The first process in namespaces of its own, after the shell commands `set_up` in them."""
    unshare = ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child"]
    shell = f"set -e; {set_up}; echo ready; sleep infinity & wait"
    process = subprocess.Popen([*unshare, "--mount-proc", "sh", "-c", shell], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    finally:
        process.kill()  # takes everything in the namespaces along
        process.wait(timeout=30)


def wait_for_ray(starts: Sequence[subprocess.Popen[str]]) -> None:
    """`starts`: from `Host.start_ray`."""
    for start in starts:
        said = start.communicate(timeout=120)
        assert start.returncode == 0, said
