"""Check the machine before anything is downloaded. Runs on any Python from 3.8 on.

    python3 deploy/check_machine.py cpu,dev

Prints the Python for `.venv`: a path, or `uv` if no Python here fits and uv shall fetch one, together with the command
for a user without the network that uv needs. If something is missing, one line on stderr says what and gives the
command to install it, and the exit code is 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Shared libraries that the wheels need but do not contain: the wheel that needs it, its package in apt and in dnf.
LIBRARIES = {
    "libnuma.so.1": ("vLLM", "libnuma1", "numactl-libs"),
    "libstdc++.so.6": ("torch", "libstdc++6", "libstdc++"),
    "libgcc_s.so.1": ("torch", "libgcc-s1", "libgcc"),
    "libz.so.1": ("Arrow", "zlib1g", "zlib"),
}
INSTRUCTIONS = ("avx2", "fma", "f16c")  # vLLM's CPU build has code for AVX2 and for AVX-512
LSCPU = ["lscpu", "--json", "--extended=CPU,CORE,NODE", "--online"]
GLIBC = (2, 28)  # the wheels are manylinux_2_28
DISK_GB = {"cpu": 5, "gpu": 15}
CUDA = 13000  # version of torch's wheels, in the driver's numbering


def main(extras: list[str]) -> int:
    python, lacks = choose_python(os.environ.get("PYTHON", ""), python_range())
    lacks += missing_libraries() + missing_compiler(python, extras)
    unfit = unfit_machine(extras)
    if not (ROOT / ".venv").exists():  # an existing environment already has its disk space
        unfit += full_disks(DISK_GB["gpu" if "gpu" in extras else "cpu"])
    if lacks or unfit:
        say(said(lacks, unfit))
        return 2
    if "gpu" in extras and cuda_driver() < CUDA:
        say("no NVIDIA driver for CUDA 13 here: what is installed will run only where there is one (580 or newer)")
    print(python, *([python_command(python_range())] if python == "uv" else []))
    return 0


def say(line: str) -> None:
    print(f"[setup] {line}", file=sys.stderr)


class Lack:
    """A missing thing that a system package provides."""

    def __init__(self, what: str, apt: str, dnf: str) -> None:
        self.what, self.packages = what, {"apt": apt, "dnf": dnf}


def said(lacks: list[Lack], unfit: list[str]) -> str:
    """One line: what is missing, the command that installs it, and what no command can provide."""
    parts = list(unfit)
    if lacks:
        parts.append(f"this machine lacks {', '.join(lack.what for lack in lacks)}: {command(lacks)}")
    return "; ".join(parts)


def command(lacks: list[Lack], os_release: str = "") -> str:
    """The install command for this system's packages."""
    system = package_system(os_release or read("/etc/os-release"))
    if not system:
        return "install " + ("it" if len(lacks) == 1 else "them") + " with the packages of your system"
    packages = " ".join(dict.fromkeys(package for lack in lacks for package in lack.packages[system].split()))
    sudo = "" if os.geteuid() == 0 else "sudo "
    if system == "apt":
        return f"{sudo}apt-get update && {sudo}apt-get install -y {packages}"
    return f"{sudo}dnf install -y {packages}"


def package_system(os_release: str) -> str:
    """`apt`, `dnf` or an empty text, from the text of /etc/os-release."""
    kinds = " ".join(re.findall(r"^ID(?:_LIKE)?=\"?([^\"\n]*)", os_release, re.MULTILINE)).split()
    if {"debian", "ubuntu"} & set(kinds):
        return "apt"
    return "dnf" if {"fedora", "rhel", "centos"} & set(kinds) else ""


# Python


def python_range() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lowest version that fits and the lowest that is too new, from pyproject.toml."""
    low, high = re.search(r'requires-python = ">=([\d.]+),<([\d.]+)"', read(ROOT / "pyproject.toml")).groups()
    return tuple(map(int, low.split("."))), tuple(map(int, high.split(".")))


def choose_python(asked: str, fitting: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[str, list[Lack]]:
    """A Python that fits, else `uv`; and the packages that are missing to make an environment with it."""
    low, high = fitting
    versions = [f"{low[0]}.{minor}" for minor in range(high[1] - 1, low[1] - 1, -1)]
    found = [probe(name) for name in ([asked] if asked else ["python3", *(f"python{v}" for v in versions)])]
    fit = [python for python in found if low <= python.version < high]
    if asked and not fit:
        version = f"Python {dotted(found[0].version)}" if found[0].version else "no Python"
        say(f"PYTHON={asked} is {version}: set it to a Python from {versions[-1]} to {versions[0]}")
        sys.exit(2)
    uv = shutil.which("uv")
    ready = [python for python in fit if python.has_venv or uv]  # uv does not need Python's venv module
    if ready:
        return ready[0].path, []
    if not fit and (uv or probe(sys.executable).has_venv):
        return "uv", []
    # Debian packages venv separately, once for each Python.
    name = f"python{dotted(fit[0].version)}" if fit else "python3"
    return fit[0].path if fit else "uv", [Lack(f"{name}'s module venv", f"{name}-venv", name)]


def python_command(fitting: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """The command to install a Python that fits from this system's packages, or a hint if there is none."""
    low, high = fitting
    for name in (f"python{low[0]}.{minor}" for minor in range(high[1] - 1, low[1] - 1, -1)):
        for tool in ("apt-cache show", "dnf info"):
            if shutil.which(tool.split()[0]) and run_quietly([*tool.split(), name]):
                return command([Lack(name, f"{name} {name}-venv", name)])
    return f"install a Python from {dotted(low)} to {high[0]}.{high[1] - 1}, with pyenv or from python.org"


def run_quietly(words: list[str]) -> bool:
    """Return True if a command exists and succeeds."""
    quiet = subprocess.DEVNULL
    try:
        return subprocess.run(words, stdout=quiet, stderr=quiet, check=False).returncode == 0
    except OSError:
        return False


class Python(NamedTuple):
    """A Python interpreter. `version` is empty if there is none. `has_venv`: it can make an environment with pip."""

    path: str = ""
    version: tuple[int, ...] = ()
    has_venv: bool = False


def probe(command: str) -> Python:
    code = "import sys; print(sys.executable, *sys.version_info[:2], sep='\\n', flush=True); import ensurepip, venv"
    try:
        told = subprocess.run([command, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return Python()
    path, *numbers = told.stdout.decode().splitlines() or [""]
    return Python(path, tuple(map(int, numbers)), told.returncode == 0)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# Libraries, compiler, driver


def missing_libraries() -> list[Lack]:
    return [
        Lack(f"{name} (for {user})", apt, dnf) for name, (user, apt, dnf) in LIBRARIES.items() if not can_load(name)
    ]


def can_load(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def missing_compiler(python: str, extras: list[str]) -> list[Lack]:
    """On GPUs Triton compiles a launcher for each kernel and needs Python's headers. On CPUs nothing is compiled."""
    if "gpu" not in extras:
        return []
    lacks = [] if shutil.which("g++") else [Lack("g++ (for Triton)", "g++", "gcc-c++")]
    if python == "uv":  # uv's Pythons include the headers
        return lacks
    code = "import sys, sysconfig; print('python%d.%d' % sys.version_info[:2], sysconfig.get_path('include'))"
    name, include = subprocess.check_output([python, "-c", code], text=True).split(None, 1)
    if not Path(include.strip(), "Python.h").is_file():
        lacks.append(Lack(f"Python.h of {name} (for Triton)", f"{name}-dev", f"{name}-devel"))
    return lacks


def cuda_driver() -> int:
    """The highest CUDA version that the driver supports, 13000 for 13.0; 0 without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


# Not in any package


def unfit_machine(extras: list[str]) -> list[str]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return [f"this machine is {platform.system()} {platform.machine()}: Linux x86-64 is needed"]
    unfit = []
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC:
        unfit.append(
            f"this system's C library is {f'{name} {version}'.strip() or 'not glibc'}: glibc {dotted(GLIBC)} is needed"
        )
    flags = read("/proc/cpuinfo").split()
    if "cpu" in extras and (lacking := [flag.upper() for flag in INSTRUCTIONS if flag not in flags]):
        unfit.append(f"this processor lacks {', '.join(lacking)}, which vLLM's CPU build uses: take another machine")
    if "cpu" in extras and not run_quietly(LSCPU):
        unfit.append(
            f"'{' '.join(LSCPU)}', by which vLLM learns of the cores, fails: is util-linux here, and /sys mounted?"
        )
    return unfit


def full_disks(need_gb: int) -> list[str]:
    """Disks with too little space: the environment's and that of uv's cache. On one disk uv links files: count once."""
    cache = os.environ.get("UV_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "uv")
    disks = {}
    for folder, cure in (
        (ROOT, "move this folder to a larger disk"),
        (Path(cache), "set UV_CACHE_DIR to another disk"),
    ):
        while not folder.exists():
            folder = folder.parent
        disks.setdefault(folder.stat().st_dev, (folder, cure))
    return [
        f"{folder} has {free / 1e9:.1f} GB free, {need_gb} are needed: free some, or {cure}"
        for folder, cure in disks.values()
        if (free := shutil.disk_usage(folder).free) < need_gb * 1e9
    ]


def read(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].split(",")))
