"""A learner: one FSDP2 rank, which turns training samples into optimizer updates.

FP32 masters and Adam moments are sharded over the ranks; a layer computes in BF16, gradients are summed in FP32.
The loss is a sum whose weights come with the samples, so gradients are added over ranks, never averaged: 1, 2 or
3 ranks, any micro-batch and unequal groups give the same update.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rft_cluster.batching import Batch, RankWork, collate
from rft_cluster.checkpoint import export_model, load_shards, save_shards
from rft_cluster.config import Config
from rft_cluster.hardware import hardware
from rft_cluster.loss import grpo_loss
from rft_cluster.qwen2vl import PolicyModel, PromptEncoder, load_policy, shard_units
from rft_cluster.weights import SharedMemorySender, WeightBroadcast, WeightClient, nccl_sender


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate in step 0, 1, ...: linear warm-up to 1, then linear decay to 0 at `steps`."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * min(1.0, (steps - step) / (steps - warmup_steps))


class Learner:
    """One rank. `cluster.py` makes it a Ray actor; all ranks are called with the same method at the same time."""

    def __init__(self, path: str, config: Config, rank: int, ranks: int, rendezvous: str, threads: int) -> None:
        """Joins the process group at `rendezvous` (a URL of torch's) and shards the model over it."""
        self._config, self._rank = config, rank
        self._hardware = hardware(config.cluster.device)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # denormals slow a small model tenfold on CPUs
        dist.init_process_group(self._hardware.process_group, init_method=rendezvous, rank=rank, world_size=ranks)
        self._device = torch.device(self._hardware.device)
        model = config.model
        self._encoder = PromptEncoder(path, model.min_pixels, model.max_pixels, model.trust_remote_code)
        self._policy = self._load(path, torch.float32, model.freeze_vision)
        self._reference = None
        if config.algorithm.kl_beta:
            self._reference = self._load(path, torch.bfloat16, freeze_vision=True).requires_grad_(False).eval()
        settings = config.optimizer
        self._optimizer = torch.optim.AdamW(
            [parameter for parameter in self._policy.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._broadcast: WeightBroadcast | None = None

    def _load(self, path: str, dtype: torch.dtype, freeze_vision: bool) -> PolicyModel:
        policy = load_policy(
            path,
            dtype,
            self._hardware.attention,
            self._encoder.vision_token_ids,
            self._config.sampling.temperature,
            freeze_vision,
            self._config.model.trust_remote_code,
        )
        policy.train()  # Qwen2-VL has no dropout; transformers checkpoints activations in training mode alone
        if self._config.learners.gradient_checkpointing and dtype == torch.float32:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in shard_units(policy):
            fully_shard(unit, mesh=mesh, mp_policy=precision)
        fully_shard(policy, mesh=mesh, mp_policy=precision)
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the loss is a sum
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
        return policy

    # Training

    def update(self, work: RankWork, step: int) -> dict[str, float]:
        """The optimizer updates of one step on this rank's share of its samples.

        Returns sums over this rank's tokens (see `loss.LossTerms`), and `grad_norm`, `learning_rate` and `skipped`
        (updates whose gradient was not finite), which are the same on all ranks.
        """
        settings, algorithm = self._config.optimizer, self._config.algorithm
        factor = learning_rate_factor(step, settings.warmup_steps, self._config.schedule.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        batches = [[self._collate(samples) for samples in update] for update in work]
        # With one update a step the old policy is the current one: its log-probabilities need no forward.
        old = None
        if len(work) > 1:
            old = [[self._logprobs(self._policy, batch) for batch in update] for update in batches]

        sums: dict[str, float] = {"skipped": 0.0, "grad_norm": 0.0}
        for i, update in enumerate(batches):
            for j, batch in enumerate(update):
                reference = self._logprobs(self._reference, batch) if self._reference else None
                logprobs, entropy = self._policy(**_inputs(batch))
                terms = grpo_loss(
                    logprobs,
                    old[i][j] if old else logprobs.detach(),
                    batch.generator_logprobs,
                    reference,
                    batch.advantages,
                    batch.weights,
                    batch.mask,
                    clip_low=algorithm.clip_low,
                    clip_high=algorithm.clip_high,
                    importance_cap=algorithm.importance_cap,
                    kl_beta=algorithm.kl_beta,
                )
                terms.loss.backward()
                counted = batch.mask & (batch.weights[:, None] > 0)
                for name, value in {**terms.sums, "entropy": float((entropy * counted).sum())}.items():
                    sums[name] = sums.get(name, 0.0) + value
            norm = self._clip_gradients()
            if torch.isfinite(norm):
                self._optimizer.step()
                sums["grad_norm"] = max(sums["grad_norm"], float(norm))
            else:
                # The norm is a sum over all ranks: all of them skip, or none.
                sums["skipped"] += 1
            self._optimizer.zero_grad()
        return {**sums, "learning_rate": settings.learning_rate * factor}

    def _collate(self, samples: list[Any]) -> Batch:
        return collate(samples, self._encoder, self._encoder.stop_token_ids[-1]).to(self._device)

    @torch.no_grad()
    def _logprobs(self, policy: PolicyModel, batch: Batch) -> Tensor:
        return policy(**_inputs(batch))[0]

    def _clip_gradients(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), self._config.optimizer.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # Weights out

    def connect_generators(self, client: WeightClient, rendezvous: dict[str, Any]) -> None:
        """Open the way to the generators. `rendezvous`: arguments of the NCCL sender; shared memory needs none."""

        def make_sender(client: WeightClient, source: Any) -> Any:
            if self._hardware.transfer == "nccl":
                return nccl_sender(client, source, **rendezvous)
            return SharedMemorySender(client, source)

        self._broadcast = WeightBroadcast(self._policy, make_sender, client)

    def send_weights(self, version: int) -> int:
        """Bring every generator to the current weights under `version`. Returns their combined digest."""
        assert self._broadcast is not None, "connect_generators comes first"
        return self._broadcast.send(version)

    # Files

    def save_checkpoint(self, folder: str) -> None:
        save_shards(Path(folder), self._policy, self._optimizer)

    def restore_checkpoint(self, folder: str, updates: int) -> None:
        """Continue from a checkpoint that has seen `updates` optimizer updates."""
        load_shards(Path(folder), self._policy, self._optimizer)
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(updates))

    def export(self, folder: str) -> None:
        export_model(Path(folder), self._policy, self._encoder, is_writer=self._rank == 0)

    def process_id(self) -> int:
        return os.getpid()


def _inputs(batch: Batch) -> dict[str, Tensor]:
    names = (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_grid_thw",
        "predictor_index",
        "completion_ids",
    )
    return {name: getattr(batch, name) for name in names}
