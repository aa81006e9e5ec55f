"""Drivers and GPUs that are too old, told before actors start. NVML is a recorder here: there is no GPU."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Never

import pytest
from ray._private import thirdparty
from ray._private.thirdparty import pynvml

from rft_cluster.cluster.gpus import Driver, Gpu, check_driver, driver_here
from rft_cluster.common.errors import UserError

H100, V100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80), Gpu("Tesla V100-SXM2-16GB", (7, 0), 16)
GOOD = Driver("580.65.06", 13000, [H100])


def test_a_driver_for_cuda_13_and_gpus_since_ampere_will_do():
    for driver in (GOOD, replace(GOOD, cuda=13010), replace(GOOD, gpus=[Gpu("NVIDIA A100", (8, 0), 40)] * 8)):
        check_driver("this machine", driver)


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (None, r"n1 has no NVIDIA driver: install one of branch 580 or newer"),
        (
            Driver("575.57.08", 12090, [H100]),
            r"n1 has the NVIDIA driver 575\.57\.08, which runs CUDA up to 12\.9: .*13\.0",
        ),
        (replace(GOOD, gpus=[H100, V100]), r"n1 has a Tesla V100-SXM2-16GB of compute capability 7\.0: .* needs 8\.0"),
        (replace(GOOD, gpus=[Gpu("NVIDIA RTX 2080", (7, 5), 8)]), r"capability 7\.5.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_too_old_is_named_with_its_host(driver, message):
    with pytest.raises(UserError, match=message):
        check_driver("n1", driver)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    cards = [H100, V100, H100]
    fake = SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        NVMLError_NotSupported=pynvml.NVMLError_NotSupported,
        NVMLError_LibraryNotFound=pynvml.NVMLError_LibraryNotFound,
        NVMLError_DriverNotLoaded=pynvml.NVMLError_DriverNotLoaded,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetName=lambda handle: cards[handle].name,
        nvmlDeviceGetCudaComputeCapability=lambda handle: cards[handle].capability,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=cards[handle].memory),
        nvmlSystemGetDriverVersion=lambda: "580.65.06",
        nvmlSystemGetCudaDriverVersion=lambda: 13000,
    )
    monkeypatch.setattr(thirdparty, "pynvml", fake, raising=False)
    return fake


@pytest.mark.parametrize(
    ("visible", "cards"),
    [
        (None, [H100, V100, H100]),
        ("0,2", [H100, H100]),
        ("0, 1", [H100, V100]),
        ("GPU-1", [V100]),
        ("", []),
        ("2", [H100]),
    ],
)
def test_gpus_that_are_not_visible_do_not_count(monkeypatch, nvml, visible, cards):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert driver_here() == Driver("580.65.06", 13000, cards)


def test_a_gpu_without_memory_of_its_own_is_no_error(monkeypatch, nvml):
    """The driver of NVIDIA's GB10 answers "Not Supported"."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml.nvmlDeviceGetMemoryInfo = fails_with(pynvml.NVMLError_NotSupported())
    assert [gpu.memory for gpu in driver_here().gpus] == [sys.maxsize] * 3


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound(), pynvml.NVMLError_DriverNotLoaded()])
def test_a_machine_without_a_driver(nvml, error):
    nvml.nvmlInit = fails_with(error)
    assert driver_here() is None


def test_a_driver_that_does_not_answer_is_not_a_missing_one(nvml):
    """It was updated, and the machine not restarted."""
    nvml.nvmlInit = fails_with(pynvml.NVMLError_LibRmVersionMismatch())
    with pytest.raises(UserError, match=r"^NVIDIA's driver on \S+ does not answer \(.*version mismatch.*restarting"):
        driver_here()


def test_a_gpu_that_is_lost_is_a_message(nvml):
    ended = []
    nvml.nvmlShutdown = lambda: ended.append(True)
    nvml.nvmlDeviceGetHandleByIndex = fails_with(pynvml.NVMLError_GpuIsLost())
    with pytest.raises(UserError, match=r"does not answer \(GPU is lost\).*Xid"):
        driver_here()
    assert ended == [True]


def fails_with(error: Exception) -> Callable[..., Never]:
    def fail(*_: object) -> Never:
        raise error

    return fail
