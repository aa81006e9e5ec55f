"""The nodes of a cluster, and what is done on each before actors start there."""

import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state  # Ray Serve asks it, too; of Ray's public functions none tells of such notices
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table

from rft_cluster.cluster.gpus import HIDE_GPUS, check_driver, driver_here
from rft_cluster.cluster.handles import wait_for
from rft_cluster.cluster.placement import NodeResources
from rft_cluster.cluster.tasks import on_node
from rft_cluster.common.errors import UserError
from rft_cluster.model.hub import whole_model

PATIENCE = 60.0  # seconds for the nodes' answers
SEEN_WITHIN = 10.0  # seconds

Addresses = Mapping[str, str]
"""Of the nodes' hosts, by Ray's node ids."""


def cluster_nodes() -> list[NodeResources]:
    """The living nodes, in a fixed order."""
    nodes = [
        NodeResources(
            node["NodeID"], node["NodeManagerAddress"], node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.node_id))


def told_to_leave() -> dict[str, float]:
    """The living nodes that were told to leave, by address, with the seconds that they have; infinity if no time was
    set. Ray calls it draining: a cloud takes a machine back, or a `ray start --block` has got SIGTERM."""
    try:
        draining = state.get_draining_nodes()  # Ray's id of a node -> milliseconds since 1970, or 0
    except RayError:  # a driver that is Ray's client (ray://) cannot ask; nothing depends on the notice
        return {}
    now = time.time()
    return {
        node.address: max(0.0, draining[node.node_id] / 1000 - now) if draining[node.node_id] else math.inf
        for node in cluster_nodes()
        if node.node_id in draining
    }


def addresses_of(groups: Sequence[PlacementGroup]) -> dict[str, str]:
    """The nodes on which Ray has placed these groups."""
    held = {node for group in groups for node in placement_group_table(group)["bundles_to_node_id"].values()}
    return {node.node_id: node.address for node in cluster_nodes() if node.node_id in held}


def check_gpus(nodes: Addresses) -> None:
    """Check the drivers and GPUs of these nodes.

    Raises:
        UserError: as `gpus.check_driver`; the message names the host.
        ClusterError: a node does not answer.
    """
    drivers = _on_each(nodes, driver_here, timeout=PATIENCE)
    for address, driver in zip(nodes.values(), drivers, strict=True):
        check_driver(address, driver)


def everywhere(path: str) -> str:
    """A model's path as actors on every node understand it: a folder's is made absolute, since Ray's processes on other
    nodes have another working folder. A name of the hub stays."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def fetch_model(nodes: Addresses, path: str, timeout: float) -> None:
    """Fetch a model of the hub into the cache of each node, unless it is there or `path` is a folder.

    The actors would do it, but within the time for their start, which the first compilation of an engine needs.

    Raises:
        UserError: as `model.hub.whole_model` on a node; the message names the host.
        ClusterError: it takes longer than `timeout` seconds.
    """
    if not Path(path).is_dir():
        print(f"fetching {path} on {len(nodes)} nodes, unless it is in their caches", flush=True)
        _on_each(nodes, _fetch, path, timeout=timeout)


def check_shared(nodes: Addresses, files: Sequence[tuple[str, Path]]) -> None:
    """Check that each node sees these files of the driver. Else learners would find no folder to save into, too late.

    `files`: each with the key of the configuration that it belongs to.

    Raises:
        UserError: a node does not; the message names the host and the key.
        ClusterError: a node does not answer.
    """
    paths = [(key, str(file.absolute())) for key, file in files]
    answers = _on_each(nodes, _unseen, tuple(path for _, path in paths), timeout=PATIENCE)
    for address, unseen in zip(nodes.values(), answers, strict=True):
        for key, path in paths:
            if path in unseen:
                raise UserError(
                    f"{key}: {address} has no {Path(path).parent} of this machine: give it a path on a disk that all "
                    f"nodes share, mounted at the same place"
                )


def _unseen(paths: Sequence[str]) -> tuple[str, ...]:
    """Those that are not here. A file that was just written may take seconds to be seen through a network."""
    end = time.monotonic() + SEEN_WITHIN
    while (unseen := tuple(path for path in paths if not Path(path).is_file())) and time.monotonic() < end:
        time.sleep(0.5)
    return unseen


def _fetch(path: str) -> None:
    try:
        whole_model(path)
    except UserError as error:
        raise type(error)(f"on {socket.gethostname()}: {error}") from error


def _on_each(nodes: Addresses, work: Callable[..., Any], *arguments: Any, timeout: float) -> list[Any]:
    """Run `work` on each node, and return the results in the nodes' order."""
    # The task takes no GPU, but sees those that Ray may give to actors.
    sees_gpus = {"env_vars": {HIDE_GPUS: "0"}}
    task, calls = ray.remote(work), {}
    for node, address in nodes.items():
        here = task.options(**on_node(node, runtime_env=sees_gpus))
        calls[here.remote(*arguments)] = address
    return wait_for(calls, timeout, work.__name__.strip("_"))
