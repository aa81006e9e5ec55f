"""Which packages the Makefile's targets install."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("target", "gpu", "extras"),
    [("gpu-test", True, "gpu,dev"), ("gpu-test", False, "cpu,dev"), ("unit", True, "cpu,dev")],
)
def test_the_checks_of_a_gpu_come_with_its_packages(tmp_path, target, gpu, extras):
    """Where there is one; `EXTRAS=` on the command line decides in any case."""
    make = shutil.which("make")
    assert make
    if gpu:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    for given, wanted in (([], extras), (["EXTRAS=gpu,flash,dev"], "gpu,flash,dev")):
        # The prerequisite counts as newer than the environment, so that it would be installed.
        command = [make, "-n", "-W", "pyproject.toml", target, *given]
        said = subprocess.run(
            command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
        ).stdout
        assert f'EXTRAS="{wanted}" bash deploy/install.sh' in said
