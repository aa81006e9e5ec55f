"""Checks of the tier *learner*: what computes with a frozen policy, in BF16 on the device against FP32 on the CPU."""

import time
from dataclasses import replace

import numpy as np

from benchmarks.gpu_check.checklist import Bench, Outcome, once
from benchmarks.gpu_check.material import SIZES, images, run_config
from benchmarks.gpu_check.updates import by_itself
from rft_cluster.config import Config
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
    found: dict[str, float] = by_itself(run_scored, bench)
    return found


def run_scored(bench: Bench) -> dict[str, float]:
    """The mean distance of names' log-probabilities in nats a token, and the relative error of an image's features;
    and the seconds of an image's names on the device, the second time."""
    (image,) = images(bench, 1).values()
    host = run_config(replace(bench, device="cpu"), "cluster.dtype=float32")
    device = run_config(bench, "cluster.dtype=bfloat16")
    question = f"{SIZES[bench.size].question} {', '.join(NAMES * (LISTED if bench.size == 'true' else 1))}"
    wanted, counts, _ = names_of(host, question, image)
    found, _, seconds = names_of(device, question, image)
    exact, seen = (VisionTower(config.model.path, config, threads=4).features(image) for config in (host, device))
    return {
        "scores": float(np.mean(np.abs(found - wanted) / counts)),
        "features": float(np.linalg.norm(seen - exact) / np.linalg.norm(exact)),
        "seconds": seconds,
    }


def names_of(config: Config, question: str, image: bytes) -> tuple[np.ndarray, np.ndarray, float]:
    """The names' log-probabilities, their numbers of tokens, and the seconds of the second call."""
    scorer = ClassScorer(config.model, config.cluster.device, config.cluster.dtype)
    scorer.load(config.model.path)
    assert scorer._loaded
    for parameter in scorer._loaded[1].parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)  # of an untrained model: else all log-probabilities are those of noise, whatever is wrong
    for _ in range(2):
        started = time.monotonic()
        sums, counts = scorer.logprobs(image, question, "<answer>", [f"{name}</answer>" for name in NAMES])
    return sums, counts, time.monotonic() - started
