"""Say what a tier of gpu_check finds installed here, and what it lacks.

    python installed.py learner

Prints the versions by folder: the machine's and the kit's. The exit code is 2 if something is missing; a line says
what, and which part brings it.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PINS = Path(__file__).parent / "pins"
OWN = ("torch", "torchvision", "numpy", "pillow", "jinja2")  # the machine's, for every tier
# The machine's, for tiers with an engine.
BESIDE = ("aiohttp", "click", "cloudpickle", "filelock", "matplotlib", "msgpack", "pandas", "protobuf", "pyarrow",
          "scikit-learn", "scipy", "threadpoolctl", "xxhash")  # fmt: skip
TORCH = ((2, 11), (2, 14))  # the lowest version that fits, and the lowest that is too new


def found(name: str) -> tuple[str, str]:
    """Version and folder of an installed package; empty texts if it is not installed."""
    try:
        one = distribution(name)
    except PackageNotFoundError:
        return "", ""
    return one.version, str(one.locate_file("").resolve())


def own(tier: str) -> tuple[str, ...]:
    return OWN if tier == "learner" else OWN + BESIDE


def layers(tier: str) -> tuple[str, ...]:
    return ("learner",) if tier == "learner" else ("learner", "ray", "vllm")


def wanted(layer: str) -> dict[str, str]:
    lines = (PINS / f"{layer}.txt").read_text().split("\n")
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def show(names: Iterable[str]) -> None:
    """Print the versions, a line for each folder that they are installed in."""
    folders: dict[str, list[str]] = {}
    for name in names:
        version, where = found(name)
        if version:
            folders.setdefault(where, []).append(f"{name} {version}")
    for where, versions in folders.items():
        print(f"{where}: {', '.join(versions)}")


def lacks(tier: str) -> list[str]:
    """What is missing or does not fit, a sentence each."""
    absent = [name for name in own(tier) if not found(name)[0]]
    missing = [f"{', '.join(absent)}: the machine's own is needed"] if absent else []
    version, _ = found("torch")
    if version and not TORCH[0] <= tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH[1]:
        missing.append(f"torch {version} is none of 2.11 to 2.13")
    for layer in layers(tier):
        others = [f"{name} {pin}" for name, pin in wanted(layer).items() if found(name)[0] != pin]
        if others:
            missing.append(f"{', '.join(others)}: a part with the layer {layer} (build.sh) brings them")
    return missing


if __name__ == "__main__":
    if sys.version_info[:2] != (3, 12):
        print(f"this is Python {sys.version.split()[0]}: the kit's packages are for 3.12", file=sys.stderr)
        sys.exit(2)
    asked = sys.argv[1]
    show([*own(asked), *(name for layer in layers(asked) for name in wanted(layer))])
    said = lacks(asked)
    for line in said:
        print(f"missing: {line}", file=sys.stderr)
    sys.exit(2 if said else 0)
