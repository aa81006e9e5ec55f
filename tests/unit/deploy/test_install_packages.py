"""pip's settings reach uv, in whatever way they were made."""

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
NAME = "rft-cluster-test-wheel"
MODULE = "rft_cluster_test_module.py"


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install_packages", ROOT / "deploy" / "install_packages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A folder of one wheel, and an index of it in `simple/`."""
    folder = tmp_path_factory.mktemp("wheels")
    file = f"{NAME.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{NAME.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(folder / file, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(MODULE, "")
    page = folder / "simple" / NAME / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../{file}">{file}</a>')
    return folder


# How a user may have named a folder of wheels or an index: a variable, or a key of pip.conf in one of its sections.
VARIABLES = [
    *("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"),
    *("UV_FIND_LINKS", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"),
]
KEYS = [(part, key) for part in ("global", "install") for key in ("find-links", "extra-index-url", "index-url")]


def clean_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return kept | {"HOME": str(home), "PIP_CONFIG_FILE": os.devnull, "UV_CACHE_DIR": str(home / "cache")}


def is_found(install, environment: dict[str, str]) -> bool:
    """Return True if uv, with these settings, would install the wheel from the named sources only."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], env=environment, capture_output=True, text=True, check=True
    )
    told = install.uv_environment(install.pip_settings(listed.stdout), environment)
    found = subprocess.run(
        [*install.UV, "--dry-run", "--offline", NAME], env=environment | told, capture_output=True, check=False
    )
    return found.returncode == 0


def test_what_nothing_names_is_not_found(install, wheels: Path, tmp_path: Path):
    assert not is_found(install, clean_environment(tmp_path))


@pytest.mark.parametrize("variable", VARIABLES)
def test_what_a_variable_names_is_used(install, wheels: Path, tmp_path: Path, variable: str):
    environment = clean_environment(tmp_path)
    place = wheels if variable.endswith("LINKS") else f"file://{wheels}/simple"
    assert is_found(install, environment | {variable: str(place)})


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_what_a_file_names_is_used(install, wheels: Path, tmp_path: Path, section: str, key: str):
    place = wheels if key == "find-links" else f"file://{wheels}/simple"
    config = tmp_path / "pip.conf"
    # Several places, a line each, as pip allows; one that is not there is skipped, as by pip.
    missing = tmp_path / "missing" if key == "find-links" else ""
    config.write_text(f"[{section}]\n{key} = {place}\n    {missing}\n")
    assert is_found(install, clean_environment(tmp_path) | {"PIP_CONFIG_FILE": str(config)})


def test_what_is_installed_is_compiled_whatever_the_environment_says(install, wheels: Path, tmp_path: Path):
    environment = clean_environment(tmp_path) | {"PYTHONDONTWRITEBYTECODE": "1", "UV_FIND_LINKS": str(wheels)}
    target = ["--target", str(tmp_path / "site"), "--offline", "--no-index"]
    subprocess.run([*install.INSTALL, *target, NAME], env=environment, check=True)
    assert Path(importlib.util.cache_from_source(str(tmp_path / "site" / MODULE))).is_file()


def test_what_uv_is_told_itself_stands(install):
    pip = {"index-url": "a", "extra-index-url": "b", "find-links": "https://c", "trusted-host": "d", "cert": "e"}
    everything = install.uv_environment(pip, {})
    for name in everything:
        assert name not in install.uv_environment(pip, {name: "mine"})


def test_the_index_of_cpu_builds_comes_beside_those_that_are_named(install):
    for named in ({}, {"UV_INDEX": "file:///one file:///two"}, {"UV_EXTRA_INDEX_URL": "file:///one"}):
        indexes = install.with_cpu_index(named)["UV_INDEX"].split()
        assert indexes == [*" ".join(named.values()).split(), install.CPU_INDEX]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_lock_has_a_version_of_each_package_that_pyproject_allows(install, project: dict, variant: str):
    """`make lock` cures it."""
    lines = (ROOT / install.LOCKS / f"{variant}.txt").read_text().splitlines()
    pins: dict[str, list[Requirement]] = {}
    for pin in (Requirement(line) for line in lines if not line.startswith("#")):
        if pin.marker is None or pin.marker.evaluate():
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    extras = project["optional-dependencies"]
    for wanted in map(Requirement, project["dependencies"] + extras[variant] + extras["dev"]):
        found = [next(iter(pin.specifier)) for pin in pins.get(canonicalize_name(wanted.name), [])]
        assert found, f"{wanted.name} is not locked for {variant}: make lock"
        assert all(pin.operator == "==" for pin in found)
        assert all(wanted.specifier.contains(pin.version) for pin in found), f"{wanted} and {found}: make lock"
    [torch] = pins["torch"]
    assert str(torch.specifier).endswith("+cpu") == (variant == "cpu")


def test_a_version_of_the_lock_is_taken_beside_the_users_own_constraints(install, wheels: Path, tmp_path: Path):
    environment = clean_environment(tmp_path) | {"UV_FIND_LINKS": str(wheels), "UV_CONSTRAINT": "mine.txt"}
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / install.LOCKS).mkdir(parents=True)
    for version, found in (("1.0", True), ("2.0", False)):
        (tmp_path / install.LOCKS / "cpu.txt").write_text(f"{NAME}=={version}\n")
        command = [*install.UV, "--dry-run", "--offline", NAME]
        done = subprocess.run(
            command, env=install.locked(environment, "cpu"), cwd=tmp_path, capture_output=True, check=False
        )
        assert (done.returncode == 0) == found
