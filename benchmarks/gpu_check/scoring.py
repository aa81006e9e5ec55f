"""Checks of the tier *learner*: what computes with a frozen policy, in BF16 on the device against FP32 on the CPU."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.common import in_a_process
from benchmarks.gpu_check.checklist import Bench, Outcome, once
from benchmarks.gpu_check.material import SIZES, images, model_folder, run_config
from benchmarks.gpu_check.updates import release
from rft_cluster.model.class_logprobs import ClassScorer
from rft_cluster.model.tower import VisionTower

NAMES = ("rose", "oxeye daisy", "bishop of llandaff", "blanket flower", "black-eyed susan", "hard-leaved pocket orchid")
LISTED = 20  # times that the question has all names, so that it is as long as that of 102 classes
SCORES, FEATURES = 0.05, 0.03  # nats a token, of the norm


def class_scores(bench: Bench) -> Outcome:
    found = scored(bench)
    return Outcome(found["scores"] <= SCORES, found["scores"], "nats", f"{found['seconds']:.2f} s an image")


def tower_features(bench: Bench) -> Outcome:
    error = scored(bench)["features"]
    return Outcome(error <= FEATURES, error)


@once
def scored(bench: Bench) -> dict[str, float]:
    """The figures of `run_scored`, made once in a process of its own."""
    release(bench)
    found: dict[str, float] = in_a_process(run_scored, bench, environment={})
    return found


def run_scored(bench: Bench) -> dict[str, float]:
    """The mean distance of names' log-probabilities in nats a token, and the relative error of an image's features;
    and the seconds of an image's names on the device, the second time."""
    (image,) = images(bench, 1).values()
    here, host = replace(bench, device="cpu"), ("cluster.dtype=float32",)
    wanted, counts, _ = names_of(here, image, host)
    found, _, seconds = names_of(bench, image)
    seen, there = (features_of(*given) for given in ((here, image, host), (bench, image)))
    return {
        "scores": float(np.mean(np.abs(found - wanted) / counts)),
        "features": float(np.linalg.norm(there - seen) / np.linalg.norm(seen)),
        "seconds": seconds,
    }


def names_of(
    bench: Bench, image: bytes, changes: Sequence[str] = ("cluster.dtype=bfloat16",)
) -> tuple[np.ndarray, np.ndarray, float]:
    """The names' log-probabilities, their numbers of tokens, and the seconds of the second call."""
    config = run_config(bench, *changes)
    scorer = ClassScorer(config.model, config.cluster.device, config.cluster.dtype)
    scorer.load(str(model_folder(bench)))
    assert scorer._loaded
    for parameter in scorer._loaded[1].parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)  # of an untrained model: else all log-probabilities are those of noise, whatever is wrong
    question = f"{SIZES[bench.size].question} {', '.join(NAMES * (LISTED if bench.size == 'true' else 1))}"
    for _ in range(2):
        started = time.monotonic()
        sums, counts = scorer.logprobs(image, question, "<answer>", [f"{name}</answer>" for name in NAMES])
    return sums, counts, time.monotonic() - started


def features_of(bench: Bench, image: bytes, changes: Sequence[str] = ("cluster.dtype=bfloat16",)) -> np.ndarray:
    return VisionTower(str(model_folder(bench)), run_config(bench, *changes), threads=4).features(image)
