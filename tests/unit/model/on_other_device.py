"""What computes with a model gives on `tests.other_device` the figures that it gives on the CPU, in each family.

    python -m tests.unit.model.on_other_device          a line for each check

A tensor that was left on the CPU is an error, as on a GPU.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.models import TRANSFER_QUESTION, family_model
from benchmarks.true_shapes import noise_image
from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config, load_config
from rft_cluster.data.images import image_sha256
from rft_cluster.learner import learner
from rft_cluster.learner.learner import Learner
from rft_cluster.messages import Example, ImageRef, Prompt, TrainingSample
from rft_cluster.model import class_logprobs, tower
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.weights.source import PolicyWeights
from tests.other_device import NAME, register

IMAGES = [noise_image(size, seed=0) for size in ((160, 96), (128, 96))]
TRAINED = {
    "GRPO": ("algorithm.updates_per_step=2",),
    "SFT": ("algorithm.objective=sft", "algorithm.kl_beta=0"),
    "LoRA": ("model.lora.rank=4",),
    "gradient checkpointing": ("learners.gradient_checkpointing=true",),
}
# Its windows are picked by index, and torch 2.13 aborts where a thread of the backward does that on a device with
# kernels in Python. So its vision tower is frozen here, and computed once.
WINDOWS = "qwen2_5_vl"
Compute = Callable[[str], list[float]]


def main() -> None:
    held = register()
    with tempfile.TemporaryDirectory() as root:
        for name, compute in checks(Path(root)).items():
            here, there = compute("cpu"), compute(NAME)
            # SDPA has another kernel on the CPU than elsewhere, which rounds in another order.
            np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5, err_msg=name)
            assert len(set(here)) > 1, f"{name}: equal numbers would be equal on every device"
            print(f"{name}: equal", flush=True)
    del held


def checks(root: Path) -> dict[str, Compute]:
    found: dict[str, Compute] = {}
    for name, family in FAMILIES.items():
        folder = family_model(root / name, family, pixels=112 * 112)
        frozen = ("model.freeze_vision=true",) if name == WINDOWS else ()
        for what in trainings(name):
            found[f"{name} {what}"] = partial(trained, folder, frozen + TRAINED[what])
        found[f"{name} probabilities"] = partial(probabilities, folder)
        found[f"{name} vision tower"] = partial(tower_features, folder)
    return found


def trainings(family: str) -> list[str]:
    """All for one family; families differ in the forward alone."""
    return list(TRAINED) if family == "qwen2_vl" else ["GRPO"]


def config(*changes: str) -> Config:
    limits = ("model.min_image_tokens=1", "model.max_image_tokens=15")
    return load_config("digits", ["cluster.device=cpu", "cluster.dtype=float32", *limits, *changes])


def moved(module: object, device: str) -> object:
    """Where a module asks for the settings of a device: those of the CPU, with another device's name."""
    there = replace(hardware("cpu", "float32"), device=device)
    return patch.object(module, "hardware", lambda *_: there)


def trained(folder: Path, changes: Sequence[str], device: str) -> list[float]:
    """The statistics of a step, and what the weights add up to that a generator would get after it."""
    images = {image_sha256(one): one for one in IMAGES}
    torch.manual_seed(0)  # of new adapters
    with moved(learner, device):
        rank = Learner(str(folder), config("optimizer.warmup_steps=0", *changes), 0, 1, images)
    for policy in filter(None, (rank._policy, rank._reference)):
        policy.float().to(rank._device)  # FSDP would compute in FP32, too
        policy.model.tie_weights()  # CUDA keeps parameters, with other data in them; this device has new ones
    trainable = [one for one in rank._policy.parameters() if one.requires_grad]
    # Adam's steps have the sign of the smallest gradients, which is that of rounding, unless eps is large.
    rank._optimizer = torch.optim.AdamW(trainable, eps=1.0)
    samples = [sample for number, sha in enumerate(images) for sample in samples_of(rank, number, sha)]
    stats = rank.update([[samples[:2]], [samples[2:]]], 0)
    sums = [float(tensor.float().abs().sum()) for _, tensor in PolicyWeights(rank._policy)]
    return [stats.loss, stats.kl, stats.entropy, stats.grad_norm, *sums]


def samples_of(rank: Learner, number: int, sha: str) -> list[TrainingSample]:
    prompt = Prompt(f"train/0/{number}", Example(ImageRef(f"{number}.png", sha), "rose"), TRANSFER_QUESTION, number)
    ids = rank._prompts.encode(prompt).token_ids
    return [
        TrainingSample(prompt, ids, [10 + number, 20 + index, 30], [-1.0] * 3, advantage, 0.1, index)
        for index, advantage in enumerate((1.0, -1.0))
    ]


def probabilities(folder: Path, device: str) -> list[float]:
    with moved(class_logprobs, device):
        scorer = class_logprobs.ClassScorer(config().model, device, threads=1)
    scorer.load(str(folder))
    logprobs, _ = scorer.logprobs(
        IMAGES[0], TRANSFER_QUESTION, "<answer>", ["rose</answer>", "lily</answer>", "o</answer>"]
    )
    return logprobs.tolist()


def tower_features(folder: Path, device: str) -> list[float]:
    with moved(tower, device):
        return tower.VisionTower(str(folder), config(), threads=1).features(IMAGES[1]).tolist()


if __name__ == "__main__":
    main()
