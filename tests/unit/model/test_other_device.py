"""Learners, the scorer of classes and the vision tower on a device that is not the CPU."""

import subprocess
import sys
from pathlib import Path

from rft_cluster.model.families.known import FAMILIES
from tests.unit.model.on_other_device import trainings

ROOT = Path(__file__).parents[3]


def test_all_that_computes_with_a_model_keeps_its_tensors_on_its_device():
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.on_other_device"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    equal = {line.removesuffix(": equal") for line in done.stdout.splitlines() if line.endswith(": equal")}
    frozen = ["probabilities", "vision tower"]
    each = {f"{family} {what}" for family in FAMILIES for what in (*trainings(family), *frozen)}
    assert equal == each


def test_a_tensor_that_was_left_on_the_cpu_is_found():
    mixed = (
        "import torch; from tests.other_device import register; held = register(); "
        "there = torch.ones(2, device='other'); print((there + 1).tolist()); there + torch.ones(2)"
    )
    done = subprocess.run([sys.executable, "-c", mixed], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[2.0, 2.0]\n"
    assert "RuntimeError: aten.add.Tensor: tensors of these shapes are on the CPU" in done.stderr
