"""Show what `ray job submit` will upload of this folder, and what deploy/runtime_env.yaml excludes.

Packs the folder with Ray's own code and discards the package.
"""

import fnmatch
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import yaml
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parent.parent
LISTED = 8
# Always excluded, so not mentioned.
ROUTINE = (
    ".git*",
    ".venv",
    ".ci",
    ".gpu_kit",
    ".*_cache",
    "runs",
    "tests",
    "docs",
    "*.egg-info",
    "__pycache__",
    "README.md",
)


def pack(folder: Path, package: Path) -> list[str]:
    """Write the upload of `folder` to `package`. Returns the paths in it."""
    excludes = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["excludes"]
    create_package(str(folder), package, include_gitignore=True, excludes=excludes, logger=Quiet())
    with ZipFile(package) as content:
        return content.namelist()


def left_out(folder: Path, packed: list[str]) -> list[str]:
    """The topmost files and folders that are excluded, without those that always are."""
    kept = {part for name in packed for part in (Path(name), *Path(name).parents)}
    found: list[str] = []

    def look(here: Path) -> None:
        for path in sorted(here.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in ROUTINE):
                continue
            if path.relative_to(folder) not in kept:
                found.append(str(path.relative_to(folder)) + ("/" if path.is_dir() else ""))
            elif path.is_dir():
                look(path)

    look(folder)
    return found


def listed(names: list[str]) -> str:
    """The first of these names, and all of code, which is missed only on the cluster."""
    code = [name for name in names if name.endswith(".py")]
    others = [name for name in names if name not in code]
    more = [f"and {len(others) - LISTED} more"] if len(others) > LISTED else []
    return ", ".join([*code, *others[:LISTED], *more])


class Quiet:
    """Silences Ray's message about packing, which only the real upload should print."""

    def info(self, message: str) -> None: ...

    def warning(self, message: str) -> None:
        print(message, file=sys.stderr)

    error = warning


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        packed = pack(ROOT, package)
        print(f"upload: {len(packed)} files, {package.stat().st_size / 1e6:.1f} MB packed", file=sys.stderr)
    names = left_out(ROOT, packed)
    if names:
        print(f"left here by deploy/runtime_env.yaml or .gitignore: {listed(names)}", file=sys.stderr)


if __name__ == "__main__":
    main()
