"""Check that TRL's gradient and ours are equal on the same batch, before anything is timed.

    python -m benchmarks.gate [--sides 448,112]

TRL makes two steps in FP32; in the second one the policy differs from the reference. The weights before that step are
recorded, and its completions, advantages and gradient. Our gradient is then computed with the learner's model, packing
and loss from the same weights, tokens and images (as our own encoder reads them). Both are in FP32, because in BF16 no
two orders of summation agree. TRL does not exclude vision tokens from the distribution, so here we do not either.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.common import CACHE, machine, parsed, write_result
from benchmarks.models import SIDES
from benchmarks.raw import RawLearner
from benchmarks.speed import make_config
from benchmarks.trl_grpo import make_trainer
from rft_cluster.config import Config
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.prompts import make_prompts
from rft_cluster.run.task import prepare

LIMIT = 1e-5  # of the gradient's norm: FP32, summed in another order
LEARNING_RATE = 1e-3  # so that one step leads away from the reference and the KL has a gradient


class Second(TrainerCallback):
    """Takes the policy before the second step, and its gradient before the optimizer sees it."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.gradient: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1:
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1:
            self.gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    options = parsed(__doc__, sides=list(SIDES), prompts=2)
    torch.set_flush_denormal(True)
    CACHE.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "limit": LIMIT, "sides": {}}
    for side in options.sides:
        config = make_config(
            *(side, 1, f"schedule.prompts_per_step={options.prompts}", f"optimizer.learning_rate={LEARNING_RATE}"),
            "optimizer.max_grad_norm=1e9",  # TRL clips before it can be looked at
            "algorithm.importance_cap=null",  # it samples with the model that it trains
            "cluster.dtype=float32",
        )
        found = compare(config)
        result["sides"][side] = found
        print(side, found, flush=True)
        if found["relative_difference"] > LIMIT:
            raise SystemExit(f"the gradients differ by {found['relative_difference']:.1e} of their norm: time nothing")
    write_result("gate", result)


def compare(config: Config) -> dict[str, float]:
    seen = Second()
    rows = config.schedule.prompts_per_step * config.sampling.group_size
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, rows, "fp32", folder)
        trainer.add_callback(seen)
        trainer.train()
    (batch,) = trainer._buffered_inputs
    samples = as_samples(config, batch)
    ours = gradient(config, samples, seen.weights)
    names = {name.removeprefix("module."): name for name in seen.gradient}
    difference = sum(float((ours[name] - seen.gradient[theirs]).square().sum()) for name, theirs in names.items())
    norm = sum(float(tensor.square().sum()) for tensor in seen.gradient.values())
    if ours.keys() != names.keys():
        raise SystemExit(f"gradients of other parameters: {sorted(ours.keys() ^ names.keys())[:3]}")
    return {
        "relative_difference": (difference / norm) ** 0.5,
        "norm": norm**0.5,
        "parameters": len(names),
        "completions": len(samples),
        "prompt_tokens": len(samples[0].prompt_token_ids),
        "completion_tokens": sum(len(sample.token_ids) for sample in samples),
    }


def as_samples(config: Config, batch: dict[str, Any]) -> list[TrainingSample]:
    """TRL's rows as ours: each image is found by its pixels, which our own encoder must make equal to the last bit."""
    task = prepare(config)
    encoder = PromptEncoder(str(config.model.path), config.model)
    asked = make_prompts(task.dataset.train, task.text, "train", 0, config.run.seed)
    prompts = PromptCache(encoder, task.dataset.images, capacity=0)
    known: list[tuple[Prompt, Any]] = [(prompt, prompts.encode(prompt)) for prompt in asked]
    patches = batch["image_grid_thw"].prod(-1).tolist()
    samples = []
    for row, pixels in enumerate(batch["pixel_values"].split(patches)):
        prompt, encoded = next(pair for pair in known if torch.equal(pair[1].pixel_values, pixels))
        prompt_ids = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        if prompt_ids != encoded.token_ids:
            raise SystemExit(f"TRL reads {len(prompt_ids)} prompt tokens, the learner {len(encoded.token_ids)}")
        tokens = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        weight = 1.0 / (len(tokens) * len(patches))
        advantage = float(batch["advantages"][row])
        samples.append(TrainingSample(prompt, prompt_ids, tokens, [0.0] * len(tokens), advantage, weight, row))
    return samples


def gradient(config: Config, samples: Sequence[TrainingSample], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the learner's loss in FP32, by the parameter's name."""
    path = str(config.model.path)
    encoder = PromptEncoder(path, config.model)
    learner = RawLearner(config, path, encoder, prepare(config).dataset.images, forbidden=[])
    learner.policy.model.load_state_dict(weights)
    learner.backward(samples)
    return {name: p.grad for name, p in learner.policy.model.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    main()
