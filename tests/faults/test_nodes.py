"""Nodes that join a run, and leave it in every way, over a real network (see tests/integration/hosts.py).

Host 1 has Ray's head and the driver, and no room for actors that need a CPU.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.faults.launched import Launch, check_records, command, has_done, is_there, shows, start, trained
from tests.faults.table import Row
from tests.faults.test_lost_actors import survives
from tests.integration.head import wait_until
from tests.integration.hosts import NETWORK, Host, Network, require_namespaces, wait_for_ray

HEAD = f"{NETWORK}.1"
ADDRESS = f"{HEAD}:6379"
# The head asks every second, and a node that does not answer three times is dead. By default that takes 30 s for a node
# that was killed, and 64 s for one that is cut off.
SOON = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "3"}  # fmt: skip
# Name -> address of every living actor, from the tables of the dashboard. Its port is open on the hosts' network alone.
TABLE = f"""
import json, sys, urllib.request
def table(name):
    headers = {{"Authorization": "Bearer " + sys.argv[1]}}
    request = urllib.request.Request("http://{HEAD}:8265/api/v0/" + name + "?limit=1000", headers=headers)
    return json.load(urllib.request.urlopen(request, timeout=20))["data"]["result"]["result"]
"""
WHERE = f"""{TABLE}
address = {{node["node_id"]: node["node_ip"] for node in table("nodes")}}
alive = [actor for actor in table("actors") if actor["state"] == "ALIVE" and actor["name"]]
print(json.dumps({{actor["name"]: address[actor["node_id"]] for actor in alive}}))
"""
# Ray's id of the living node with an address.
NODE_OF = f"""{TABLE}
print(*[node["node_id"] for node in table("nodes") if (node["node_ip"], node["state"]) == (sys.argv[2], "ALIVE")])
"""


class Nodes:
    """Hosts that are nodes of one Ray cluster."""

    def __init__(self, network: Network, environment: dict[str, str], shared: Path) -> None:
        self._network, self._environment, self._shared = network, environment, shared
        self._head = network.add(1)
        self._hosts: dict[str, Host] = {}
        options = ["--head", "--port=6379", "--num-cpus=0", f"--dashboard-host={HEAD}"]
        wait_for_ray([self._head.start_ray(*options)])

    def join(self, *numbers: int, cpus: int = 1) -> list[Host]:
        """Add these hosts to the cluster."""
        hosts = [self._network.add(number) for number in numbers]
        self._hosts |= {host.address: host for host in hosts}
        wait_for_ray([host.start_ray(f"--address={ADDRESS}", f"--num-cpus={cpus}") for host in hosts])
        return hosts

    def host_of(self, actor: str) -> Host:
        return self._hosts[self.actors()[actor]]

    def lose(self, host: Host) -> None:
        """Kill everything on a host at once."""
        os.kill(host.pid, signal.SIGKILL)

    def tell_to_leave(self, host: Host, seconds: int) -> None:
        words = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken back", f"--address={ADDRESS}"]
        node = self._head.must(sys.executable, "-S", "-c", NODE_OF, self._token, host.address).strip()
        self._head.must("ray", "drain-node", f"--node-id={node}", f"--deadline-remaining-seconds={seconds}", *words)

    def unplug(self, host: Host) -> None:
        self._network.unplug(host)

    def plug_in(self, host: Host) -> None:
        self._network.plug_in(host)

    def actors(self) -> dict[str, str]:
        """The living actors' hosts."""
        return json.loads(self._head.must(sys.executable, "-S", "-c", WHERE, self._token))

    @property
    def _token(self) -> str:
        return Path(self._environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    def launch(self, words: list[str], run: Path) -> Launch:
        return start(words, run, inside=self._head.enter, **self._environment, RAY_ADDRESS=ADDRESS)


@pytest.fixture
def nodes(token_environment: dict[str, str], tmp_path: Path) -> Iterator[Nodes]:
    require_namespaces()
    environment = token_environment | {"PYTHONUNBUFFERED": "1"} | SOON
    with ExitStack() as stack:
        yield Nodes(Network(stack, tmp_path, environment), environment, tmp_path)


def serves(host: Host) -> Callable[[Launch], bool]:
    """A generator on this host has written completions by trained weights."""
    return lambda launch: bool(re.search(r"^generate: version [1-9]\d*, [1-9]\d* completions", host.logs, re.MULTILINE))


STEPS = 150


@pytest.mark.timeout(1200)
def test_generators_come_and_go_with_their_nodes(nodes: Nodes, tmp_path: Path, tiny_model: str):
    run = tmp_path / "mine"
    nodes.join(2, cpus=2)  # room for the learners and one generator
    overrides = [f"schedule.steps={STEPS}", "schedule.evaluate_every=0", "data.validation=0", "generators.count=2",
                 "generators.min=1"]  # fmt: skip
    launch = nodes.launch(command(tmp_path, "mine", tiny_model, *overrides), run)
    launch.until(has_done(3), "step 3")
    assert "no node has room for generator-1 now" in launch.text()
    assert {"generator-0", "generator-1"} & nodes.actors().keys() == {"generator-0"}

    rows = []
    for number, fault, kind, strike in (
        (3, 12, "a generator's node is killed", nodes.lose),
        (4, 12, "a generator's node is cut off", nodes.unplug),
        (5, 23, "a generator's node leaves (ray stop)", lambda host: host.must("ray", "stop")),
    ):
        host, seconds, step = take_up(nodes, launch, number)
        rows.append(Row(23, "a generator comes with a node", f"after step {step}", lost=seconds, ledger=True))
        step = launch.steps()
        found, lost, warning = survives(launch, partial(strike, host))
        assert re.match(r"generator-1 died while '\w+': its process .*(gone with its node|answers no more)", warning)
        rows.append(Row(fault, kind, f"after step {step}", found, lost, ledger=True))
        if strike == nodes.unplug:
            nodes.plug_in(host)
            wait_until(partial(has_ended, host, "ray::Generator"), 60, "the old generator has ended")
    launch.ends(0)
    check_records(run, STEPS)
    for row in rows:
        row.write()


def has_ended(host: Host, process: str) -> bool:
    return process not in host.must("ps", "-eo", "args")


def take_up(nodes: Nodes, launch: Launch, number: int) -> tuple[Host, float, int]:
    """Let a host join, with room for a generator, and see that one serves there.

    Returns the host, the seconds until it serves, and the step that was done when it joined.
    """
    (host,) = nodes.join(number)
    joined, step = time.monotonic(), launch.steps()
    launch.until(serves(host), f"a generator serves on {host.address}", 120)
    served = time.monotonic() - joined
    (name,) = [name for name, address in nodes.actors().items() if address == host.address]
    assert name.startswith("generator-1")
    return host, served, step


@pytest.mark.timeout(1200)
def test_learners_start_where_there_is_room(nodes: Nodes, undisturbed: Path, tmp_path: Path, tiny_model: str):
    """Where there is none, the run ends in time, and goes on when there is."""
    run = tmp_path / "mine"
    nodes.join(2, 3, 4, 5)  # one for each actor, and another
    overrides = ["learners.cpus=1", "cluster.start_timeout=60", "cluster.snapshot_every=1"]
    launch = nodes.launch(command(tmp_path, "mine", tiny_model, *overrides), run)
    launch.until(is_there("checkpoints/step-000004"), "a checkpoint")
    found, lost, warning = survives(launch, partial(nodes.lose, nodes.host_of("learner-1")))
    assert re.match(r"learner-1( \(\w+\))? died while '", warning), warning
    assert "from memory" in launch.text(), "from the second copy: the first is gone with its node"

    (again,) = [name for name in nodes.actors() if name.startswith("learner-1.")]
    struck = time.monotonic()
    nodes.lose(nodes.host_of(again))
    launch.ends(3, seconds=150)
    ended = time.monotonic() - struck
    *_, error, cure = launch.text().splitlines()
    assert error.startswith("error: what was lost finds no room: the run needs 3 CPUs, the cluster has 2 on 3 node")
    assert " is saved; go on with: " in cure
    nodes.join(6)
    nodes.launch(launch.cure(), run).ends(0)
    check_records(run)
    assert trained(run) == trained(undisturbed)
    Row(12, "a learner's node is killed", "", found, lost, ledger=True, exact=True).write()
    Row(12, "a learner's node is killed, no other has room: exit code 3", "", ended, ledger=True, exact=True).write()


@pytest.mark.timeout(900)
def test_a_step_is_saved_before_a_node_leaves_that_was_told_to(nodes: Nodes, tmp_path: Path, tiny_model: str):
    """As when a cloud takes a machine back: Ray knows when. The notice comes in a step whose completions take long,
    here because a generator is frozen.
    """
    run = tmp_path / "mine"
    nodes.join(2, 3, 4, 5)  # one for each actor, and another
    overrides = [f"schedule.steps={STEPS}", "schedule.save_every=999", "schedule.evaluate_every=0", "data.validation=0",
                 "learners.cpus=1"]  # fmt: skip
    launch = nodes.launch(command(tmp_path, "mine", tiny_model, *overrides), run)
    launch.until(has_done(2), "step 2")
    host = nodes.host_of("learner-1")
    writer = nodes.host_of("generator")
    writer.must("pkill", "-STOP", "-f", "^ray::Generator")
    nodes.tell_to_leave(host, seconds=30)
    told, done = time.monotonic(), launch.steps()
    launch.until(shows("was told to leave"), "the notice was read", 20)
    heard = time.monotonic() - told
    launch.until(lambda launch: list(launch.run.glob("checkpoints/step-??????")), "a whole checkpoint", 20)
    found = time.monotonic() - told
    assert launch.steps() <= done + 1, "the loop waits for the generator that is frozen"
    print(f"told of after {heard:.1f} s, saved after {found:.1f} s")
    writer.must("pkill", "-CONT", "-f", "^ray::Generator")
    line = rf"^{host.address} \([\w, -]*learner-1[\w, -]*\) was told to leave within \d+ s: saving step \d+ at once$"
    assert re.search(line, launch.text(), re.MULTILINE), launch.text()
    _, lost, _ = survives(launch, partial(nodes.lose, host))
    launch.ends(0)
    assert "the learners start afresh" in launch.text()
    check_records(run, STEPS)
    Row(12, "a learner's node is told to leave, then killed", f"after step {done}", found, lost, ledger=True).write()
