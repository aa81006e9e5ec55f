"""Check what works on this machine's GPUs, and how fast.

    python -m benchmarks.gpu_check                                    all tiers
    python -m benchmarks.gpu_check --tier learner several             some
    python -m benchmarks.gpu_check --device cpu                       the same checks on a CPU, at a tiny size

    learner     attention, FSDP2 updates, memory, digests, files; needs neither vLLM nor Ray
    generator   the vLLM engine: log-probabilities, sleep and wake, seeds
    shared      generator and learner on one GPU: CUDA IPC, whole GRPO steps, memory in each phase
    digits      a run that learns
    several     more GPUs than one: NCCL to several generators, tensor parallelism, two learners

Each tier takes under four minutes on one GPU of 80 GB and writes OUT/TIER.json after each check; a second call goes on
after the last check that is recorded there. Weights are random, in the true shapes: nothing is downloaded. What the
checks print, with tracebacks, is in OUT/TIER.log. The exit code is 1 if a check failed, 2 if a package is missing.
A check that needs more GPUs than there are is skipped.
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CACHE, in_a_process, machine, nvidia_gpus
from benchmarks.gpu_check.checklist import Bench, Line, run_tier
from rft_cluster.common.errors import UserError, exit_code
from rft_cluster.common.files import bytes_in, check_space, check_writable
from rft_cluster.common.hardware import openmp_environment

# A tier's process ends at once, whatever locks its libraries hold, and multiprocessing would warn of them.
QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"
SIZE = {"cuda": "true", "cpu": "tiny"}  # at true size a learner takes 65 GiB and, on a CPU, hours
# NVIDIA's images set it to 1. Products of FP32 matrices then have TF32's 10 bits, and what checks compare with is no
# more exact than BF16.
TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
DISK = 10 * 10**9  # bytes at true size: the model, and the checkpoint or the export that is read back
# The packages that a tier needs, beside those of a learner.
NEEDS: dict[str, tuple[str, ...]] = {
    "learner": (),
    "generator": ("vllm",),
    "shared": ("vllm", "ray"),
    "digits": ("vllm", "ray"),
    "several": ("vllm", "ray"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", nargs="+", choices=NEEDS, default=list(NEEDS), metavar="TIER", help="(all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("true", "tiny"), help="of the models (true on a GPU, tiny on a CPU)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), metavar="FOLDER", help="(runs/gpu_check)")
    parser.add_argument("--again", action="store_true", help="run all checks, whatever is recorded")
    options = parser.parse_args(arguments)
    gpus = nvidia_gpus()
    check_device(options.device, len(gpus))
    gpus = gpus[: torch.cuda.device_count()]  # CUDA_VISIBLE_DEVICES may hide some from programs
    check_writable(options.out, "choose another folder with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.device, options.size or SIZE[options.device], CACHE / "gpu_check")
    check_room(bench)
    bench.folder.mkdir(parents=True, exist_ok=True)
    about = {"device": bench.device, "size": bench.size, "gpus": gpus, "machine": machine()}
    print(heading(bench, gpus), flush=True)
    codes = [tier_code(tier, bench, options.out.absolute(), about, options.again) for tier in options.tier]
    return 1 if 1 in codes else max(codes)


def check_device(device: str, gpus: int) -> None:
    """Raise UserError if there is no GPU where one is asked for, or no nvidia-smi, which lists `gpus`."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"torch {torch.__version__}, {built}, finds no GPU here (nvidia-smi lists {gpus or 'none'}). The checks "
            f"can be tried on a CPU, at a tiny size: python -m benchmarks.gpu_check --device cpu"
        )
    if not gpus:
        raise UserError(
            "torch finds a GPU, but nvidia-smi, which measures its memory, is not here or lists none: add the "
            "folder of the driver's programs to PATH (in containers often /usr/local/nvidia/bin)"
        )


def check_room(bench: Bench) -> None:
    """Raise UserError if the bench's folder cannot be written, or has no room for files of true size."""
    cure = "Models are kept there: export HOME=FOLDER, one on a disk that has room and can be written"
    check_writable(bench.folder, cure)
    if bench.size == "true":
        check_space(bench.folder, DISK - bytes_in(bench.folder), "a model of 2.2 billion parameters and a copy", cure)


def heading(bench: Bench, gpus: list[dict[str, Any]]) -> str:
    found = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in gpus) if bench.device == "cuda" else "CPU"
    return f"{found}, torch {torch.__version__}, size {bench.size}"


def tier_code(tier: str, bench: Bench, out: Path, about: dict[str, Any], again: bool) -> int:
    """Run a tier in a process of its own, and return its exit code: 1 if a check failed, 2 if something is missing."""
    missing = [package for package in NEEDS[tier] if not find_spec(package)]
    if missing:
        print(f"{tier}: not run, {' and '.join(missing)} missing: EXTRAS=gpu,dev make setup", flush=True)
        return 2
    started = time.monotonic()
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": QUIET, TF32: "0", **openmp_environment(bench.device)}
    try:
        lines: list[Line] = in_a_process(run_tier, tier, bench, out, about, again, environment=environment)
    except SystemExit as end:  # its process died, as by a signal; the next tier has one of its own
        print(f"{tier}: {end}; {out / tier}.log", flush=True)
        return 1
    counts = {result: sum(line.result == result for line in lines) for result in ("pass", "fail", "skip")}
    said = ", ".join(f"{count} {result}" for result, count in counts.items())
    print(f"{tier}: {said}, {time.monotonic() - started:.0f} s; {out / tier}.json and .log", flush=True)
    # What is skipped, for want of a second GPU or on a CPU, is not missing there.
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
