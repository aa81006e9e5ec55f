"""Three hosts on one machine: learners meet over a real network and weights leave their host.

A host is a set of Linux namespaces: its own network card (10.77.0.1, .2, .3 on one switch), processes, /dev/shm,
/tmp/ray and name. What one process of a host passes to another by /proc is not there on the next host. The files of
the tests are on all of them, as on shared storage. Everything goes when the process that holds a namespace is killed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from rft_cluster import actors
from rft_cluster.actors import Generators, GeneratorsClient
from rft_cluster.errors import UserError
from rft_cluster.learner import reach_store

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
FOUR = ["schedule.steps=2", "schedule.prompts_per_step=4", "optimizer.warmup_steps=1", "schedule.evaluate_every=0",
        "data.validation=0", "data.test=20", f"cluster.address={NETWORK}.1:6379",
        "learners.count=2", "learners.cpus=1.5", "generators.count=2", "generators.cpus=0.5"]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(480),
]  # three Ray nodes and five actors on what may be two busy cores


@dataclass(frozen=True)
class Host:
    address: str
    pid: int  # of its first process, as the machine counts
    ray_folder: Path
    environment: dict[str, str]

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        enter = ["nsenter", f"--target={self.pid}", "--net", "--pid", "--mount", "--uts"]
        return subprocess.Popen(
            [*enter, *command], env=self.environment, cwd=ROOT, text=True,
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

    @property
    def roles(self) -> set[str]:
        """Classes of all actors that ever ran here, from the head lines of their logs."""
        logs = [path.read_text(errors="replace") for path in self.ray_folder.glob("session_2*/logs/worker-*.out")]
        return set(re.findall(r"^:actor_name:(\w+)$", "\n".join(logs), re.MULTILINE))


def require_namespaces() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    probe = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces are not permitted here: {tried.stderr.strip()}")
    if shutil.which("ip") is None:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "iproute2"]):
            subprocess.run(command, check=True, capture_output=True, timeout=120)


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


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[dict[int, Host]]:
    """Hosts 1, 2 and 3 by their number."""
    require_namespaces()
    shared = tmp_path_factory.mktemp("shared")
    token = shared / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONUNBUFFERED": "1",
    }
    Path("/tmp/ray").mkdir(exist_ok=True)  # the place where each host mounts its own
    with ExitStack() as stack:
        up = "ip link set lo up"
        switch = stack.enter_context(namespaces(f"{up}; ip link add switch type bridge; ip link set switch up"))
        made = {}
        for number in (1, 2, 3):
            folder = shared / f"ray-{number}"
            folder.mkdir()
            mounts = f"mount --bind {folder} /tmp/ray; mount -t tmpfs tmpfs /dev/shm; hostname host-{number}"
            pid = stack.enter_context(namespaces(f"{up}; {mounts}"))
            made[number] = Host(f"{NETWORK}.{number}", pid, folder, environment)
            cable = f"ip link add port-{number} type veth peer name eth0 netns {pid}"
            plug = f"{cable}; ip link set port-{number} master switch up"
            subprocess.run(["nsenter", f"--target={switch}", "--net", "sh", "-ec", plug], check=True, timeout=30)
            made[number].must("ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            made[number].must("ip", "link", "set", "eth0", "up")
        yield made


@pytest.fixture(scope="module")
def ray_hosts(hosts: dict[int, Host]) -> dict[int, Host]:
    """A head without CPUs on host 1, two nodes of two CPUs on the others."""
    start = [BIN / "ray", "start", "--disable-usage-stats", "--object-store-memory=100000000"]
    head = ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
    node = [f"--address={hosts[1].address}:6379", "--num-cpus=2"]
    hosts[1].must(*start, *head, f"--node-ip-address={hosts[1].address}", seconds=120)
    others = [host.start(*start, *node, f"--node-ip-address={host.address}") for host in (hosts[2], hosts[3])]
    for other in others:
        said = other.communicate(timeout=120)
        assert other.returncode == 0, said
    return hosts


HOLD_MEMORY = """
import os, time
file = os.memfd_create("weights")
os.write(file, b"weights")
print(f"/proc/{os.getpid()}/fd/{file}", flush=True)
time.sleep(30)
"""


def test_memory_of_one_host_is_not_there_on_another(hosts: dict[int, Host]):
    """So that a generator there can only have its weights from Ray's object store."""
    holder = hosts[2].start(sys.executable, "-S", "-c", HOLD_MEMORY)
    assert holder.stdout is not None
    path = holder.stdout.readline().strip()
    assert hosts[2].run("cat", path).stdout == "weights"
    assert "No such file" in hosts[3].run("cat", path).stderr
    holder.kill()


def test_a_run_over_hosts(ray_hosts: dict[int, Host], tiny_model: str, tmp_path: Path):
    """Host 2 has learner 0 and a generator that maps its memory, host 3 the other learner and generator."""
    where = [f"model.path={tiny_model}", f"run.folder={tmp_path}", "run.name=hosts"]
    launch = [sys.executable, "-m", "rft_cluster.launch", "--config", "digits", *where, *FOUR]
    result = ray_hosts[1].run(*launch, seconds=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "step 2/2" in result.stdout
    # Two of each, so one of each on both.
    assert {"Learner", "Generator"} <= ray_hosts[2].roles
    assert {"Learner", "Generator"} <= ray_hosts[3].roles
    assert not {"Learner", "Generator"} & ray_hosts[1].roles
    steps = [json.loads(line) for line in (tmp_path / "hosts" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    # Of all generators: stale weights would show as 0.17 nats.
    assert all(step["logprob_gap"] < 0.02 for step in steps)
    assert (tmp_path / "hosts" / "model" / "config.json").exists()


MEET = """
import sys, time
import ray
from rft_cluster.actors import Learners
from rft_cluster.cluster import connect
from rft_cluster.config import load_config
from rft_cluster.errors import UserError
from rft_cluster.learner import Learner
model, *overrides = sys.argv[1:]
config = load_config("digits", overrides)
connect(config.cluster, 0)
addresses = ["10.77.0.2", "10.77.0.3"]
handles = {
    f"learner-{rank}": ray.remote(Learner)
    .options(num_cpus=1, resources={f"node:{address}": 0.001})
    .remote(model, config, rank, 2, address, 1)
    for rank, address in enumerate(addresses)
}
ray.get([handle.__ray_ready__.remote() for handle in handles.values()], timeout=200)
start = time.monotonic()
try:
    Learners(handles, 200).join(addresses, 200)
except UserError as error:
    print(error)
print(time.monotonic() - start)
"""


@contextmanager
def filtered(source: Host, target: Host) -> Iterator[None]:
    """Packets between two hosts vanish: the card that they are sent to does not exist."""
    source.must("ip", "neighbour", "replace", target.address, "lladdr", "02:00:00:00:00:fe", "dev", "eth0")
    try:
        yield
    finally:
        source.must("ip", "neighbour", "delete", target.address, "dev", "eth0")


def test_learners_that_cannot_reach_each_other_say_so(ray_hosts: dict[int, Host], tiny_model: str):
    with filtered(ray_hosts[3], ray_hosts[2]):
        said = ray_hosts[1].must(sys.executable, "-c", MEET, tiny_model, *FOUR, seconds=240)
    *_, message, seconds = said.splitlines()
    assert re.fullmatch(
        r"learner 1 on 10\.77\.0\.3 cannot reach learner 0 at 10\.77\.0\.2:\d{4,5} within 10 s \(timed out\): "
        r"the hosts of a cluster must reach each other on all ports",
        message,
    )
    assert 9 < float(seconds) < 15


def test_only_generators_on_other_hosts_are_sent_the_bytes(tmp_path: Path, monkeypatch):
    """The others map the learners' memory, of which they get the path."""
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(range(10)))
    sent = []
    monkeypatch.setattr(actors.ray, "put", lambda data: sent.append(data) or "reference")

    calls = []
    monkeypatch.setattr(Generators, "call_each", lambda self, method, arguments: calls.append((method, arguments)))
    generators = Generators({"generator-0": None, "generator-1": None, "generator-2": None}, 1)
    client = GeneratorsClient(generators, ["10.0.0.1", "10.0.0.2", "10.0.0.2"], 1, sender_address="10.0.0.1")
    info = {"path": str(memory), "nbytes": 8}
    client.update_weights(info)
    assert calls == [("update_weights", [(info,), (info, "reference"), (info, "reference")])]
    assert [data.tolist() for data in sent] == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_a_port_that_refuses_is_named_at_once():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"learner 1 on 10\.0\.0\.2 cannot reach learner 0 at 127\.0\.0\.1:9 .*refused"):
        reach_store("tcp://127.0.0.1:9", 1, "10.0.0.2")
    assert time.monotonic() - start < 2
