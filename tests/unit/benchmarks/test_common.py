"""Helpers of the benchmarks: processes of their own, and the GPUs that are here."""

import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import common


def test_a_function_in_a_process_of_its_own_answers():
    assert common.in_a_process(int, "12", environment={}) == 12


def test_the_error_of_a_process_is_named():
    with pytest.raises(SystemExit, match="int failed: ValueError: invalid literal"):
        common.in_a_process(int, "twelve", environment={})


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("NVIDIA H100 80GB HBM3, 81920, 580.65.06\n", [("NVIDIA H100 80GB HBM3", 80.0, "580.65.06")]),
        ("A, 24576, 580.1\nB, 49152, 580.1\n", [("A", 24.0, "580.1"), ("B", 48.0, "580.1")]),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", []),
    ],
)
def test_gpus_are_those_of_nvidia_smi(monkeypatch, said, found):
    monkeypatch.setattr(common.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(common.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=said))
    assert [tuple(gpu.values()) for gpu in common.nvidia_gpus()] == found


def test_a_gpu_that_uses_its_host_s_memory_has_that(monkeypatch):
    monkeypatch.setattr(common.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    said = subprocess.CompletedProcess([], 0, stdout="NVIDIA GB10, [N/A], 580.95.05\n")
    monkeypatch.setattr(common.subprocess, "run", lambda *_, **__: said)
    monkeypatch.setattr(common.psutil, "virtual_memory", lambda: SimpleNamespace(total=128 * 2**30))
    assert common.nvidia_gpus() == [{"name": "NVIDIA GB10", "memory_gib": 128.0, "driver": "580.95.05"}]


def test_without_nvidia_smi_there_are_none(monkeypatch):
    monkeypatch.setattr(common.shutil, "which", lambda _: None)
    assert common.nvidia_gpus() == []


def test_a_copy_without_git_knows_its_commit(monkeypatch, tmp_path):
    (tmp_path / "COMMIT").write_text("f434b85\n")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.machine()["commit"] == "f434b85"
