"""What the GPUs of a host and their driver can do, asked before actors start.

With a driver that is too old, an actor would fail at its first CUDA call, minutes after its start. NVML is asked here,
the library of nvidia-smi, which needs neither CUDA nor torch.
"""

import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

from rft_cluster.common.errors import UserError

CUDA = 13000  # that torch and vLLM of the extra `gpu` are built for, 13.0 in NVML's numbering
BRANCH = 580  # of NVIDIA's drivers: the oldest for CUDA 13
CAPABILITY = (8, 0)  # flash-attention in BF16 needs it: Ampere (A100, RTX 30) and newer
# With 1, an actor without GPUs sees none. By default it sees all of its node, and a reward's model would go to GPU 0.
HIDE_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"


@dataclass(frozen=True)
class Gpu:
    """`capability`: CUDA's compute capability, e.g. (9, 0). `memory`: in bytes, `sys.maxsize` if the driver knows none,
    as of a GPU that uses its host's memory (GB10)."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver on a host. `cuda`: the newest version that it runs, 13000 for 13.0. `gpus`: the visible ones."""

    version: str
    cuda: int
    gpus: list[Gpu]


def driver_here() -> Driver | None:
    """This host's driver and the GPUs that CUDA_VISIBLE_DEVICES leaves; None without a driver.

    Raises:
        UserError: the driver does not answer, or a GPU is lost; the message names the host.
    """
    from ray._private.thirdparty import pynvml as nvml

    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return None
    except nvml.NVMLError as error:  # e.g. a driver that was updated without a restart
        raise _broken(error) from error
    try:
        return _asked(nvml)
    except nvml.NVMLError as error:  # e.g. a GPU that fell off the bus
        raise _broken(error) from error
    finally:
        nvml.nvmlShutdown()


def _broken(error: Exception) -> UserError:
    return UserError(
        f"NVIDIA's driver on {socket.gethostname()} does not answer ({error}): see nvidia-smi, and dmesg for "
        f"lines with Xid; restarting that machine often helps"
    )


def _asked(nvml: Any) -> Driver:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        names = {str(index), nvml.nvmlDeviceGetUUID(handle)}  # either may be in the variable
        if visible is None or names & {word.strip() for word in visible.split(",")}:
            capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(Gpu(nvml.nvmlDeviceGetName(handle), capability, _memory(nvml, handle)))
    return Driver(nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion(), gpus)


def _memory(nvml: Any, handle: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError_NotSupported:
        return sys.maxsize


def check_driver(host: str, driver: Driver | None) -> None:
    """Check that a host's driver and GPUs can run the packages of the extra `gpu`.

    Raises:
        UserError: the driver is missing or too old, or one of the GPUs is too old.
    """
    if driver is None:
        raise UserError(f"{host} has no NVIDIA driver: install one of branch {BRANCH} or newer")
    if driver.cuda < CUDA:
        raise UserError(
            f"{host} has the NVIDIA driver {driver.version}, which runs CUDA up to {driver.cuda // 1000}."
            f"{driver.cuda % 1000 // 10}: torch and vLLM need {CUDA // 1000}.0. Install a driver of branch {BRANCH} or "
            f"newer"
        )
    for gpu in driver.gpus:
        if gpu.capability < CAPABILITY:
            raise UserError(
                f"{host} has a {gpu.name} of compute capability {gpu.capability[0]}.{gpu.capability[1]}: attention in "
                f"BF16 needs {CAPABILITY[0]}.{CAPABILITY[1]} (A100, RTX 30 or newer). Leave it out with "
                f"CUDA_VISIBLE_DEVICES, set before Ray starts there"
            )
