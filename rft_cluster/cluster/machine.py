"""Check, without importing Ray, that a run could start on this machine as a cluster of one node.

If a running cluster is joined, `start.check_cluster` checks its nodes instead.
"""

import math
import os
import sys
from pathlib import Path

from rft_cluster.cluster.gpus import CAPABILITY, Gpu, check_driver, driver_here
from rft_cluster.cluster.placement import NodeResources, bundles, place
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import check_writable, size
from rft_cluster.common.network import address_on
from rft_cluster.config import ClusterSection, Config

SOCKET_BYTES = 107  # longest path of a Unix socket on Linux


def check_machine(config: Config, training: bool = True) -> str:
    """Check the plan against this machine. Returns a note for the user, or an empty text.

    Raises:
        UserError: the machine lacks GPUs, a driver for them, or the configured network interface.
    """
    if config.cluster.joins:
        return ""
    if config.cluster.interface is not None:
        address_on(config.cluster.interface)
    cpus = sum(bundle.cpus for bundle in bundles(config, training))
    gpus = sum(bundle.gpus for bundle in bundles(config, training))
    cores = os.cpu_count() or 1
    # Fewer cores are only noted: CPUs determine threads (see `start.connect`), and one core still runs the demo.
    here = NodeResources("here", "this machine", max(cores, math.ceil(cpus)), _gpus() if gpus else 0)
    try:
        place(config, [here], training)
    except UserError as error:
        raise UserError(
            f"{error}. That is of this machine: to join a cluster, set RAY_ADDRESS or cluster.address"
        ) from error
    if gpus:
        check_driver("this machine", driver_here())
    if cpus > cores:
        return f"note: the plan counts {cpus:g} CPUs and this machine has {cores}: the actors will share them"
    return ""


def ray_folder() -> str:
    """The folder of Ray's sockets and logs."""
    return os.path.join(os.environ.get(_named_by(), "/tmp"), "ray")


def _named_by() -> str:
    """The variable that names its parent; empty if none does, and it is in /tmp."""
    return next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")


def check_ray_folder(config: ClusterSection) -> None:
    """Check the folder of Ray's sockets and logs: RAY_TMPDIR, TMPDIR or /tmp.

    Raises:
        UserError: a socket's path would be too long, or that folder or the token's folder is not writable.
    """
    if config.joins:
        return
    name, folder = _named_by(), ray_folder()
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"  # every session's name has this length
    too_long = len(os.fsencode(os.path.join(folder, session, "sockets", "plasma_store"))) - SOCKET_BYTES
    if too_long > 0:
        raise UserError(
            f"{name} is {too_long} bytes too long for Ray's sockets ({os.environ[name]}): export RAY_TMPDIR=/tmp, or "
            f"another short path"
        )
    check_writable(Path(folder), "Ray needs it: export RAY_TMPDIR=FOLDER, a short path that can be written")
    token = token_file()
    if makes_token() and not token.exists():
        check_writable(token.parent, "Ray keeps its token there: export HOME=FOLDER, one that can be written")


def token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def makes_token() -> bool:
    """Return True if a Ray that is started here writes `token_file`, unless it is there."""
    is_on = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    return is_on and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)


def memory_here() -> int:
    """Memory of this machine or container, in bytes."""
    from ray._common.utils import get_system_memory

    return int(get_system_memory())


def object_store_here() -> int:
    """Memory in bytes that a Ray which is started on this machine now gives to its object store."""
    from ray._private.utils import estimate_available_memory, resolve_object_store_memory

    return int(resolve_object_store_memory(estimate_available_memory()))


def shared_memory_note(config: ClusterSection) -> str:
    """A note if a Ray that is started on this machine finds /dev/shm too small for its object store; else empty."""
    from ray._private.utils import get_shared_memory_bytes

    free, store = get_shared_memory_bytes(), 0 if config.joins else object_store_here()
    if store <= free:
        return ""
    return (
        f"note: /dev/shm has {size(free)} free, and Ray's object store takes {size(store)}: Ray keeps it in /tmp, on "
        f"the disk, which is slower. Start a container with --shm-size={-(-store // 10**9)}g, or remove files there"
    )


def address_here() -> str:
    """This host's address, as Ray finds it."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def _gpus() -> int:
    """The number of GPUs, as Ray counts them: those of the driver, limited by CUDA_VISIBLE_DEVICES."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager as Nvidia

    visible = Nvidia.get_current_process_visible_accelerator_ids()
    count: int = Nvidia.get_current_node_num_accelerators()
    return count if visible is None else min(count, len(visible))


def smallest_gpu() -> tuple[str, int]:
    """The driver's name of the smallest visible GPU, and its memory in bytes.

    Parts of GPUs (MIG) are not listed: if only such are visible, the name is empty and the memory without a limit.
    """
    driver = driver_here()
    assert driver is not None, "check_machine comes first"
    smallest = min(driver.gpus, key=lambda gpu: gpu.memory, default=Gpu("", CAPABILITY, sys.maxsize))
    return smallest.name, smallest.memory
