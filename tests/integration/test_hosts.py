"""Three hosts on one machine: learners meet over a real network and weights leave their host."""

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rft_cluster.cluster.placement import NodeResources, describe_placement
from rft_cluster.config import load_config
from tests.integration.hosts import NETWORK, ROOT, Host, Network, require_namespaces, wait_for_ray

pytestmark = pytest.mark.timeout(1800)  # several Rays, and a run over three hosts

SHORT = ["schedule.steps=2", "schedule.prompts_per_step=4", "optimizer.warmup_steps=1", "schedule.evaluate_every=0",
         "data.validation=0", "data.test=0"]  # fmt: skip


@pytest.fixture(scope="module")
def hosts(token_environment: dict[str, str], tmp_path_factory) -> Iterator[dict[int, Host]]:
    """Hosts 1, 2 and 3 by their number."""
    require_namespaces()
    with ExitStack() as stack:
        network = Network(stack, tmp_path_factory.mktemp("shared"), token_environment | {"PYTHONUNBUFFERED": "1"})
        yield {number: network.add(number) for number in (1, 2, 3)}


@pytest.fixture(scope="module")
def ray_hosts(hosts: dict[int, Host]) -> dict[int, Host]:
    """A head of one CPU on host 1, and nodes of two CPUs on hosts 2 and 3."""
    wait_for_ray([hosts[1].start_ray("--head", "--port=6379", "--num-cpus=1", "--include-dashboard=false")])
    join = [f"--address={hosts[1].address}:6379", "--num-cpus=2"]
    wait_for_ray([hosts[number].start_ray(*join) for number in (2, 3)])
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


@pytest.mark.slow
def test_before_a_run_over_hosts_all_nodes_are_waited_for(ray_hosts: dict[int, Host]):
    """The lines of docs/deploy.md for a few machines, with a token on each."""
    ready = ["env", f"RAY_ADDRESS={NETWORK}.1:6379", sys.executable, ROOT / "deploy" / "when_ready.py", "3"]
    said = ray_hosts[1].must(*ready, "echo", "go on", seconds=120)
    assert said == "3 nodes have joined 10.77.0.1:6379\ngo on\n"


@pytest.mark.slow
def test_a_run_over_hosts(ray_hosts: dict[int, Host], tiny_model: str, tmp_path: Path):
    """No host holds two ends: the generator finds room beside the driver alone, and a host has it for one learner."""
    where = [f"model.path={tiny_model}", f"run.folder={tmp_path}", "run.name=hosts"]
    actors = [f"cluster.address={NETWORK}.1:6379", "learners.count=2", "learners.cpus=1.9", "generators.cpus=1"]
    nodes = [NodeResources("", ray_hosts[number].address, cpus, 0) for number, cpus in ((1, 1), (2, 2), (3, 2))]
    assert describe_placement(load_config("digits", actors), nodes) == (
        "  10.77.0.2: learner-0\n  10.77.0.3: learner-1\n  10.77.0.1: generator"
    )
    launch = [sys.executable, "-m", "rft_cluster.launch", "--config", "digits", *where, *SHORT, *actors]
    result = ray_hosts[1].run(*launch, seconds=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "step 2/2" in result.stdout
    for number, role in ((1, "Generator"), (2, "Learner"), (3, "Learner")):
        assert {"Learner", "Generator"} & ray_hosts[number].roles == {role}
    assert re.search(r"the actors were started on\n  10\.77\.0\.[23]: learner-0", result.stdout)
    steps = [json.loads(line) for line in (tmp_path / "hosts" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    # Stale weights would show as 0.17 nats.
    assert all(step["logprob_gap"] < 0.02 for step in steps)
    assert (tmp_path / "hosts" / "model" / "config.json").exists()


# Rank 1 imports torch first, which takes seconds, and is told then where rank 0 is: rank 0 waits no longer than 4 s.
MEET = """
import pathlib, sys, time
from rft_cluster.learner import rendezvous
from rft_cluster.common.errors import UserError
rank, address, *told = sys.argv[1:]
rendezvous.REACH_TIMEOUT = 2.0
try:
    if told:
        print("ready", flush=True)
        while not pathlib.Path(told[0]).exists():
            time.sleep(0.05)
        store = rendezvous.reach_store(pathlib.Path(told[0]).read_text(), int(rank), address)
    else:
        store = rendezvous.open_store(address)
        print(f"tcp://{address}:{store.port}")
    with rendezvous.connections(store, int(rank), 2, "eth0"):
        print("reached")
        store.set(f"reached {rank}", "")
        store.wait(["reached 0", "reached 1"])
except UserError as error:
    print(error)
"""


def meet(hosts: dict[int, Host], close: Callable[[int], None]) -> list[str]:
    """What rank 0 on host 2 and rank 1 on host 3 say, after `close` closed ports, all but its argument, say."""
    meeting = [sys.executable, "-c", MEET]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "rendezvous"
        second = hosts[3].start(*meeting, "1", hosts[3].address, told)
        assert second.stdout is not None and second.stdout.readline() == "ready\n"
        first = hosts[2].start(*meeting, "0", hosts[2].address)
        assert first.stdout is not None
        rendezvous = first.stdout.readline().strip()
        close(int(rendezvous.rpartition(":")[2]))
        told.with_suffix(".new").write_text(rendezvous)
        told.with_suffix(".new").rename(told)
        return [process.communicate(timeout=60)[0].strip() for process in (first, second)]


def test_learners_on_two_hosts_reach_each_other(hosts: dict[int, Host]):
    assert meet(hosts, lambda port: None) == ["reached", "reached"]


ALL_PORTS = "the hosts of a cluster must reach each other on all ports"


def test_learners_behind_a_firewall_that_lets_only_the_meeting_through_say_so(hosts: dict[int, Host]):
    """gloo would wait for the deadline of the whole group."""
    ip = ["ip", "rule"]

    def filter_all_but(port: int) -> None:
        """Packets to other ports of host 2 vanish."""
        hosts[2].must(*ip, "add", "pref", "100", "lookup", "local")
        hosts[2].must(*ip, "delete", "pref", "0")  # it comes before all others
        for pref, ports in (("10", f"1-{port - 1}"), ("11", f"{port + 1}-65534")):
            hosts[2].must(*ip, "add", "pref", pref, "iif", "eth0", "ipproto", "tcp", "dport", ports, "blackhole")

    try:
        first, second = meet(hosts, filter_all_but)
    finally:
        hosts[2].must(*ip, "add", "pref", "0", "lookup", "local")
        for pref in ("10", "11", "100"):
            hosts[2].must(*ip, "delete", "pref", pref)
    # Answers to host 2 vanish, too.
    reach = r"cannot reach learner {} at 10\.77\.0\.{}:\d+ within 2 s \(timed out\): " + ALL_PORTS
    assert re.fullmatch(r"learner 0 on 10\.77\.0\.2 \(eth0\) " + reach.format(1, 3), first)
    assert re.fullmatch(r"learner 1 on 10\.77\.0\.3 \(eth0\) " + reach.format(0, 2), second)


def test_learners_that_do_not_meet_at_all_say_so(hosts: dict[int, Host]):
    """Packets to host 2 vanish: the card that they are sent to does not exist."""
    neighbour = [hosts[2].address, "dev", "eth0"]

    def lose(port: int) -> None:
        hosts[3].must("ip", "neighbour", "replace", *neighbour, "lladdr", "02:00:00:00:00:fe")

    try:
        first, second = meet(hosts, lose)
    finally:
        hosts[3].must("ip", "neighbour", "delete", *neighbour)
    assert first == "learner 0 on 10.77.0.2 (eth0) waited 4 s for learner 1, which did not come"
    reach = r"cannot reach learner 0 at 10\.77\.0\.2:\d+ within 2 s \(timed out\): "
    assert re.fullmatch(r"learner 1 on 10\.77\.0\.3 " + reach + ALL_PORTS, second)
