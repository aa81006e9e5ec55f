"""Why an actor died, in one line: from Ray's report, and from what the kernel of its host has said."""

import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError

from rft_cluster.cluster.tasks import on_node

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
PATIENCE = 5.0  # seconds for another host's answer; a loss waits for it
# Of Linux 4.19 and newer. The limit is told some lines before, if it is a container's and not the host's memory.
KILLED = re.compile(
    r"[Oo]ut of memory: Killed process (\d+) \(.*\) total-vm.* anon-rss:(\d+)kB, file-rss:(\d+)kB, shmem-rss:(\d+)kB"
)
LIMIT = re.compile(r"memory: usage \d+kB, limit (\d+)kB")
UNEXPLAINED = "The actor died unexpectedly before finishing this task."  # of an argument, while its node goes down
BY_RAY = re.compile(r"low on memory.* was ([\d.]+)GB used / ([\d.]+)GB", re.DOTALL)


def of_host(pid: int, host: str) -> str:
    """`of_kernel` on the host with this address; empty if there is no answer."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == host]
    if not nodes:
        return ""
    if ray.get_runtime_context().get_node_id() in nodes:
        return of_kernel(pid)
    with suppress(RayError):
        there = OF_KERNEL.options(**on_node(nodes[0], max_retries=0))
        return str(ray.get(there.remote(pid), timeout=PATIENCE))
    return ""


def cause_of(report: str, ask: Callable[[int, str], str] = of_host) -> str:
    """One line from Ray's report on a dead actor, which guesses at length; all of it if the actor's own code failed.

    Args:
        ask: what a host's kernel says about the end of a process.
    """
    pid, host = (re.search(rf"^\s*{key}: (\S+)$", report, re.MULTILINE) for key in ("pid", "ip"))
    process = f"its process ({pid[1]} on {host[1]})" if pid and host else "its process"
    if "Worker unexpectedly exits" in report:
        known = ask(int(pid[1]), host[1]) if pid and host else ""
        likely = "was killed, or crashed. Often there is no memory left: the system's log (dmesg) says so"
        words = f"worker-*-{pid[1] if pid else ''}.err"
        return f"{process} {known or likely}. Its last words are in Ray's logs there, {words}"
    if report.startswith("Failed to retrieve object"):
        return f"{process} had answered, and the answer is gone with its node"
    if report.startswith("The task is not schedulable: The node specified"):
        return "its node is gone"
    if "low on memory" in report:
        used = BY_RAY.search(report)
        figures = f": {float(used[1]):.1f} of {float(used[2]):.1f} GiB were used" if used else ""
        return f"{process} was killed by Ray, because its host was low on memory{figures}"
    if "node" in report and "has died" in report and "Worker exit" not in report:
        return f"{process} is gone with its node"
    if "is unavailable: " in report:
        where = re.search(r"ipv[46]:(\S+):\d+: ", report)
        process = f"its process on {where[1]}" if where else process
        return f"{process} answers no more: the process, its node or the link is down"
    if dead := re.search(r"^The actor is dead because (it was killed by [^\n]*)$", report, re.MULTILINE):
        return f"{process}: {dead[1]}"
    if report.startswith(UNEXPLAINED) and "is dead because" not in report:
        return f"{process} is gone, or its node is"
    return report


def of_kernel(pid: int) -> str:
    """What this host's kernel says about the end of a process, to follow its name; empty if it says nothing."""
    with suppress(OSError, subprocess.TimeoutExpired):  # no such command; below, no such files or rights
        log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", check=False, timeout=5).stdout
        if found := killed_for_memory(log, pid, psutil.virtual_memory().total):
            return found
    with suppress(OSError):
        return killed_in_container(CGROUPS, Path("/proc/self/cgroup").read_text())
    return ""


OF_KERNEL = ray.remote(of_kernel)


def killed_for_memory(log: str, pid: int, total: int) -> str:
    """What the kernel's log says, which many systems show to root alone. `total`: bytes of the host's memory."""
    found = [match for match in KILLED.finditer(log) if int(match[1]) == pid]
    if not found:
        return ""
    kill = found[-1]
    limits = LIMIT.findall(log, 0, kill.start()) if "Memory cgroup" in log[kill.start() - 20 : kill.start()] else []
    of = int(limits[-1]) * 1024 if limits else total
    used = sum(map(int, kill.groups()[1:])) * 1024
    return f"was killed by the kernel: out of memory, {used / GIB:.1f} of {of / GIB:.1f} GiB"


def killed_in_container(root: Path, groups: str) -> str:
    """What the counters of this process's container say (control groups, version 2), which everybody may read.

    They count, and do not tell who was killed.

    Args:
        root: where the control groups are mounted.
        groups: the text of /proc/self/cgroup.
    """
    own = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    inner = root / own[1] if own else root
    for folder in (inner, *inner.parents):  # the innermost with a limit
        limit, events = folder / "memory.max", folder / "memory.events"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            kills = re.search(r"^oom_kill (\d+)$", events.read_text(), re.MULTILINE)
            return _counted(int(kills[1]) if kills else 0, int(most))
    return ""


def _counted(kills: int, limit: int) -> str:
    if not kills:
        return ""
    return (
        f"was killed, or crashed. In its container, which has {limit / GIB:.1f} GiB, the kernel has killed {kills} "
        f"process{'es' * (kills > 1)} for memory so far"
    )
