"""Install this folder and its extras with uv, from the sources that pip is configured for.

    .venv/bin/python deploy/install_packages.py cpu,dev    # in the versions of deploy/locks/cpu.txt
    .venv/bin/python deploy/install_packages.py --lock     # make lock: both files in deploy/locks/ anew

uv reads its own configuration and environment (`UV_INDEX`, `UV_FIND_LINKS`, ...) but not pip's. This script passes on
pip's settings, from files and environment (`PIP_INDEX_URL`, `PIP_FIND_LINKS`, ...), unless uv has its own.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = [str(Path(sys.prefix) / "bin" / "uv"), "pip", "install", "--python", sys.executable]
# Half a minute, once. Else the first run's processes all compile the same modules at the same time; and where
# PYTHONDONTWRITEBYTECODE is set, as in many containers, each process of each run does: its imports take twice as long.
INSTALL = [*UV, "--quiet", "--compile-bytecode"]
# The CPU builds of torch and torchvision. PyPI's builds need gigabytes of CUDA packages.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECTIONS = ("global", "install", ":env:")  # later ones take precedence
VARIANTS = ("cpu", "gpu")
LOCKS = Path("deploy", "locks")  # relative to ROOT: uv takes a space in a path of its variables for the next path
# For every Python that pyproject.toml allows. Versions that a lock has are kept where they still fit.
COMPILE = [UV[0], "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.11", "--no-annotate",
           "--no-emit-index-url", "--quiet", "--custom-compile-command", "make lock"]  # fmt: skip


def pip_settings(listed: str) -> dict[str, str]:
    """The settings of `pip install` as name -> value, from the output of `pip config list`."""
    settings: dict[str, str] = {}
    rows = [line.partition("=") for line in listed.splitlines()]
    for section in SECTIONS:
        for key, _, value in rows:
            if key.startswith(f"{section}."):
                settings[key.removeprefix(f"{section}.")] = ast.literal_eval(value)
    return settings


def uv_environment(pip: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """uv's environment variables for pip's settings. uv's own settings take precedence."""
    links = [link for link in pip.get("find-links", "").split() if "://" in link or Path(link).exists()]
    extra = pip.get("extra-index-url", "").split()
    told = {
        ("UV_DEFAULT_INDEX", "UV_INDEX_URL"): pip.get("index-url", ""),
        ("UV_INDEX", "UV_EXTRA_INDEX_URL"): " ".join(extra),
        ("UV_FIND_LINKS",): ",".join(links),
        ("UV_CONSTRAINT",): " ".join(pip.get("constraint", "").split()),
        ("UV_INSECURE_HOST",): " ".join(pip.get("trusted-host", "").split()),
        ("SSL_CERT_FILE",): pip.get("cert", ""),
        ("ALL_PROXY", "HTTPS_PROXY", "https_proxy"): pip.get("proxy", ""),
        # pip treats all indexes alike; uv by default takes a package from the first index that has any version of it.
        ("UV_INDEX_STRATEGY",): "unsafe-best-match" if extra else "",
    }
    return {names[0]: value for names, value in told.items() if value and not any(map(environment.get, names))}


def with_cpu_index(environment: Mapping[str, str]) -> dict[str, str]:
    indexes = f"{environment.get('UV_INDEX') or environment.get('UV_EXTRA_INDEX_URL') or ''} {CPU_INDEX}".strip()
    return {**environment, "UV_INDEX": indexes, "UV_INDEX_STRATEGY": "unsafe-best-match"}


def finds_cpu_torch(options: list[str], environment: dict[str, str]) -> bool:
    """Return True if the configured folders and indexes have the CPU build of torch that vLLM is pinned to."""
    text = (ROOT / "pyproject.toml").read_text()
    wanted = re.search(r'"torch>=([\d.]+),', text)
    assert wanted, "pyproject.toml names torch's first version"
    command = [*UV, *options, "--quiet", "--dry-run", "--no-deps", f"torch=={wanted[1]}+cpu"]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def locked(environment: dict[str, str], variant: str) -> dict[str, str]:
    """The environment with a variant's lock beside the user's own constraints."""
    constraints = f"{environment.get('UV_CONSTRAINT', '')} {LOCKS / variant}.txt".strip()
    return {**environment, "UV_CONSTRAINT": constraints}


def lock(environment: dict[str, str], options: list[str]) -> int:
    """Write the lock of each variant. Returns uv's exit code."""
    for variant in VARIANTS:
        chosen = environment
        if variant == "cpu" and not finds_cpu_torch(options, environment):
            chosen = with_cpu_index(environment)
        if variant == "gpu":  # in a folder of wheels torch 2.13.0+cpu would win over 2.13.0
            chosen = {name: value for name, value in environment.items() if name != "UV_FIND_LINKS"}
        command = [*COMPILE, *options, "--extra", variant, "--extra", "dev", "--output-file", f"{LOCKS / variant}.txt"]
        if code := subprocess.run(command, env=chosen, cwd=ROOT, check=False).returncode:
            return code
    return 0


def install(environment: dict[str, str], options: list[str], extras: str) -> int:
    """Install the extras, in the versions of their variant's lock. Returns uv's exit code."""
    if "cpu" in extras.split(",") and not finds_cpu_torch(options, environment):
        environment = with_cpu_index(environment)
    for variant in set(VARIANTS) & set(extras.split(",")):
        environment = locked(environment, variant)
    command = [*INSTALL, *options, "--editable", f"{ROOT}[{extras}]"]
    code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    if code:
        print(f"[setup] if your sources lack a version of {LOCKS}/: make lock, then again", file=sys.stderr)
    return code


def main(asked: str) -> int:
    command = [sys.executable, "-m", "pip", "config", "list"]
    pip = pip_settings(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    environment = {**os.environ, **uv_environment(pip, os.environ)}
    options = ["--no-index"] if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else []
    return lock(environment, options) if asked == "--lock" else install(environment, options, asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
