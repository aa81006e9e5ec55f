"""Say what a tier of gpu_check finds installed here, and what it lacks.

    python installed.py learner

Prints a line a package: its version, and whether the kit brought it. The exit code is 2 if something is missing; one
line says what, and which part brings it.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PINS = Path(__file__).parent / "pins"
OWN = ("torch", "torchvision", "numpy", "pillow", "jinja2")  # the machine's
TORCH = ((2, 11), (2, 14))  # the lowest version that fits, and the lowest that is too new
LAYERS = {"learner": ("learner",)}
ENGINE = ("learner", "ray", "vllm")  # of all other tiers


def found(name: str) -> tuple[str, str]:
    """Version and folder of an installed package; empty texts if it is not installed."""
    try:
        one = distribution(name)
    except PackageNotFoundError:
        return "", ""
    return one.version, str(one.locate_file("").resolve())


def wanted(layer: str) -> dict[str, str]:
    lines = (PINS / f"{layer}.txt").read_text().split("\n")
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def lacks(tier: str) -> list[str]:
    """Print what is installed, and return what is missing or does not fit."""
    missing = [f"{name}: the machine's own is needed" for name in OWN if not found(name)[0]]
    version, _ = found("torch")
    if version and not TORCH[0] <= tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH[1]:
        missing.append(f"torch {version} is none of 2.11 to 2.13")
    for name in OWN:
        print(f"  {name:28} {found(name)[0]:24} {found(name)[1]}")
    for layer in LAYERS.get(tier, ENGINE):
        absent = []
        for name, pin in wanted(layer).items():
            version, where = found(name)
            print(f"  {name:28} {version or 'missing':24} {where}")
            absent += [] if version == pin else [f"{name} {pin}"]
        if absent:
            missing.append(f"{', '.join(absent)}: a part with the layer {layer} (build.sh) brings them")
    return missing


if __name__ == "__main__":
    if sys.version_info[:2] != (3, 12):
        print(f"this is Python {sys.version.split()[0]}: the kit's packages are for 3.12", file=sys.stderr)
        sys.exit(2)
    said = lacks(sys.argv[1])
    for line in said:
        print(f"missing: {line}", file=sys.stderr)
    sys.exit(2 if said else 0)
