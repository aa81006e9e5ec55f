"""The checks of a machine before set-up downloads anything."""

import importlib.util
import itertools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "deploy" / "check_machine.py"
FLAGS = ("avx2", "fma", "f16c")
SYSTEMS = {
    "debian": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
    "ubuntu": "NAME=Ubuntu\nID=ubuntu\nID_LIKE=debian\n",
    "mint": 'ID=linuxmint\nID_LIKE="ubuntu debian"\n',
    "fedora": "ID=fedora\nVERSION_ID=43\n",
    "rocky": 'ID="rocky"\nID_LIKE="rhel centos fedora"\n',
    "arch": "ID=arch\n",
    "none": "",
}


@pytest.fixture(scope="module")
def machine():
    spec = importlib.util.spec_from_file_location("check_machine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_machine"] = module
    spec.loader.exec_module(module)
    return module


def test_every_system_library_that_vllm_and_torch_load_is_looked_for(machine):
    """Whatever the wheels load from outside of the environment is the C library's own, or in the list."""
    packages = Path(sysconfig.get_paths()["purelib"])
    wheels = [*(packages / "vllm").glob("*.so"), packages / "torch" / "lib" / "libtorch_python.so"]
    assert wheels[1:], "vLLM's extensions are where they are looked for"
    loader = next(Path("/lib64").glob("ld-linux-x86-64.so.2"))
    paths = os.pathsep.join(str(packages / folder) for folder in ("torch/lib", "../.."))
    needed: set[str] = set()
    for wheel in wheels:
        listed = subprocess.run(
            [loader, "--library-path", paths, "--list", wheel], capture_output=True, text=True, check=False
        )
        for line in listed.stdout.splitlines():
            name, _, place = line.strip().partition(" => ")
            if place and str(Path(sys.prefix)) not in place:
                needed.add(name)
    of_c_library = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
    assert "libnuma.so.1" in needed
    assert needed - of_c_library <= set(machine.LIBRARIES) | {"libcuda.so.1"}


@pytest.mark.parametrize(("system", "root"), itertools.product(SYSTEMS, (True, False)))
def test_one_line_names_all_that_is_missing_and_what_to_type(machine, monkeypatch, system: str, root: bool):
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(machine, "read", lambda path: SYSTEMS[system])
    missing = [machine.Lack(name, apt, dnf) for name, (_, apt, dnf) in machine.LIBRARIES.items()]
    for count in range(1, len(missing) + 1):
        for lacks in itertools.combinations(missing, count):
            line = machine.said(list(lacks), [])
            assert "\n" not in line
            assert all(lack.what in line for lack in lacks)
            assert ("sudo " in line) == (not root and system not in ("arch", "none"))
            kind = {"fedora": "dnf", "rocky": "dnf", "arch": "", "none": ""}.get(system, "apt")
            if kind:
                assert line.endswith(" ".join(lack.packages[kind] for lack in lacks))
            else:
                assert "packages of your system" in line


def make_python(folder: Path, name: str, version: str, has_venv: bool) -> None:
    """A command that answers as a Python of that version would."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' {path} {version.replace('.', ' ')}\nexit {0 if has_venv else 1}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("uv", [True, False])
@pytest.mark.parametrize("others", [(), ("3.11",), ("3.12",), ("3.11", "3.12")])
@pytest.mark.parametrize(("default", "has_venv"), itertools.product(("3.9", "3.11", "3.12", "3.20"), (True, False)))
def test_a_python_that_fits_is_taken_else_uv_brings_one(
    machine, monkeypatch, tmp_path: Path, default: str, has_venv: bool, others: tuple[str, ...], uv: bool
):
    make_python(tmp_path, "python3", default, has_venv)
    for version in others:
        make_python(tmp_path, f"python{version}", version, has_venv=True)
    if uv:
        make_python(tmp_path, "uv", "0", has_venv=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    python, lacks = machine.choose_python("", ((3, 11), (3, 13)))
    fits = default in ("3.11", "3.12")
    if fits and (has_venv or uv):
        assert (python, lacks) == (str(tmp_path / "python3"), [])
    elif others:
        assert (python, lacks) == (str(tmp_path / f"python{others[-1]}"), [])
    elif not fits and (has_venv or uv):
        assert (python, lacks) == ("uv", [])
    else:
        assert [lack.packages["apt"] for lack in lacks] == [f"python{default}-venv" if fits else "python3-venv"]


@pytest.mark.parametrize("asked", ["3.9", "3.20", None])
def test_a_python_that_was_asked_for_and_does_not_fit_is_an_error(tmp_path: Path, asked: str | None):
    if asked:
        make_python(tmp_path, "python", asked, has_venv=True)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
    told = subprocess.run([sys.executable, SCRIPT, "cpu"], env=environment, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert f"PYTHON={tmp_path / 'python'}" in told.stderr


@pytest.mark.parametrize("lacking", [names for n in range(4) for names in itertools.combinations(FLAGS, n)])
@pytest.mark.parametrize("extras", [["cpu", "dev"], ["gpu"]])
def test_instructions_count_where_vllm_uses_them(machine, monkeypatch, lacking: tuple[str, ...], extras: list[str]):
    flags = "flags : " + " ".join({"sse2", "avx2", "fma", "f16c"} - set(lacking))
    monkeypatch.setattr(machine, "read", lambda path: flags)
    said = "; ".join(machine.unfit_machine(extras))
    for name in ("AVX2", "FMA", "F16C"):
        assert (name in said) == ("cpu" in extras and name.lower() in lacking)


@pytest.mark.parametrize("free", [0.0, 4.9e9, 5.1e9, 1e12])
def test_a_disk_without_room_is_named_once(machine, monkeypatch, free: float):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: _Usage(free))
    said = machine.full_disks(5)
    assert bool(said) == (free < 5e9)
    assert all("5 are needed" in line for line in said)


class _Usage:
    def __init__(self, free: float) -> None:
        self.free = free


def test_the_range_of_pythons_is_that_of_the_package(machine):
    low, high = machine.python_range()
    assert low <= sys.version_info[:2] < high


@pytest.mark.parametrize(("tool", "system"), [("apt-cache", "debian"), ("dnf", "fedora"), ("none", "none")])
@pytest.mark.parametrize("had", [(), ("python3.11",), ("python3.12",), ("python3.11", "python3.12", "python3.20")])
def test_where_uv_cannot_bring_one_the_system_may(machine, monkeypatch, tmp_path: Path, tool, system, had):
    script = tmp_path / tool
    script.write_text(f"#!/bin/sh\ncase ' {' '.join(had)} ' in *\" $2 \"*) exit 0;; esac\nexit 100\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "read", lambda path: SYSTEMS[system])
    said = machine.python_command(((3, 11), (3, 13)))
    if tool == "none" or not had:
        assert "from 3.11 to 3.12" in said
    else:
        newest = "python3.12" if "python3.12" in had else "python3.11"
        assert said.endswith(f"install -y {newest}" + (f" {newest}-venv" if tool == "apt-cache" else ""))


@pytest.mark.parametrize("extras", [["cpu"], ["gpu"]])
@pytest.mark.parametrize("outcome", ["works", "fails", "is missing"])
def test_lscpu_is_tried_as_vllm_will(machine, monkeypatch, tmp_path: Path, outcome: str, extras: list[str]):
    if outcome != "is missing":
        (tmp_path / "lscpu").write_text(f"#!/bin/sh\nexit {0 if outcome == 'works' else 1}\n")
        (tmp_path / "lscpu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ("lscpu" in "; ".join(machine.unfit_machine(extras))) == (extras == ["cpu"] and outcome != "works")
