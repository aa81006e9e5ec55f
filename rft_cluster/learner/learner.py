"""A learner: one FSDP2 rank that turns training samples into optimizer updates.

FP32 master weights and Adam moments are sharded over the ranks. Layers compute in BF16 (in FP32 on processors without
BF16 instructions); gradients are summed in FP32. The loss is a sum with the samples' weights, so gradients are added
over ranks, not averaged: any number of ranks, any micro-batches and unequal groups give the same update.
"""

import math
import os
import resource
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from rft_cluster.algorithm.loss import grpo_loss, sft_loss
from rft_cluster.common.errors import RepeatedUpdate
from rft_cluster.common.hardware import hardware
from rft_cluster.common.network import exactly, interface_to
from rft_cluster.common.reduce import reduced
from rft_cluster.config import Config
from rft_cluster.learner.checkpoint import (
    export_model,
    load_shards,
    put_back,
    set_optimizer_updates,
    state_bytes,
    take_snapshot,
)
from rft_cluster.learner.collate import Batch, collate
from rft_cluster.learner.packing import RankWork
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.learner.rendezvous import connections, open_store, reach_store
from rft_cluster.learner.snapshot import Snapshot
from rft_cluster.messages import CompletionGap, Images, LearnerStats, TrainingSample
from rft_cluster.model.computing import set_up_torch, within_memory
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import PolicyModel, base_model, load_policy, load_reference
from rft_cluster.weights.sender import Forward, WeightOffer, WeightSender
from rft_cluster.weights.shared_memory import SharedMemorySender
from rft_cluster.weights.source import WIRE_DTYPE, PolicyWeights
from rft_cluster.weights.vllm_senders import IPCSender, NCCLSender

GIB = 2**30
LESS = (  # memory
    "lower learners.micro_batch_tokens or model.max_image_tokens; then learners.gradient_checkpointing=true, "
    "model.lora.rank=64, and on GPUs learners.cpu_offload=true"
)


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Factor of the peak learning rate in `step`, from 0: linear warm-up to 1, then linear decay to 0 at `steps`."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * min(1.0, (steps - step) / (steps - warmup_steps))


def prompts_of(samples: Sequence[TrainingSample]) -> tuple[str, ...]:
    """`prompt_id (image_id)` of each prompt once, in order."""
    prompts = {sample.prompt.prompt_id: sample.prompt for sample in samples}
    return tuple(f"{name} ({prompt.example.image.image_id})" for name, prompt in prompts.items())


def completion_gaps(completions: Sequence[TrainingSample], gaps: Tensor) -> tuple[CompletionGap, ...]:
    """The mean log-prob gap of each completion that counts, from the gaps of all their tokens, [C] nats, in order.

    A padding sample has a weight of 0 and does not count: its completion is in another micro-batch, too.
    """
    pieces = gaps.cpu().split([len(sample.token_ids) for sample in completions])  # one copy, not one a completion
    return tuple(
        CompletionGap(sample.prompt.prompt_id, sample.index, float(own.mean()))
        for sample, own in zip(completions, pieces, strict=True)
        if sample.weight > 0
    )


def _log_update(step: int, stats: LearnerStats, updates: int, seconds: float) -> None:
    """Say what a step has learned in the actor's log, which Ray keeps. `updates`: number of them, skipped or not."""
    figures = f"{stats.tokens} tokens here, loss {stats.loss:.3g}, gradient {stats.grad_norm:.3g}, {seconds:.1f} s"
    print(f"learn: step {step}, {figures}", flush=True)
    if stats.skipped:
        left_out = f"{stats.skipped} of {updates} updates left out, because the loss or the gradient was not finite"
        print(f"WARNING: step {step}: {left_out}: lower optimizer.learning_rate if more follow", flush=True)


class Learner:
    """One rank. `cluster/` makes it a Ray actor; all ranks are called with the same method at the same time."""

    def __init__(self, path: str, config: Config, rank: int, threads: int, images: Images) -> None:
        """Load the model on the CPU. `join` later makes it one of several ranks, on any host."""
        self._config, self._rank = config, rank
        self._hardware = hardware(config.cluster.device, config.cluster.dtype, config.shares_gpus)
        set_up_torch(threads)
        self._device = torch.device(self._hardware.device)
        model = config.model
        self._encoder = PromptEncoder(path, model)
        # SFT is plain cross-entropy. GRPO trains the distribution that the generators sample from.
        sampled = (self._encoder.forbidden_token_ids, config.sampling.temperature)
        how = (path, model, self._hardware.attention, *(sampled if config.algorithm.samples else ([], 1.0)))
        self._prompts = PromptCache(self._encoder, images, config.learners.prompt_cache_gib * GIB)
        self._collating = ThreadPoolExecutor(1, "collate")
        self._policy = load_policy(*how)
        if config.learners.gradient_checkpointing:
            self._policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._reference: PolicyModel | None = None
        if config.algorithm.kl_beta and not model.lora:
            self._reference = load_reference(*how)
        self._store: dist.TCPStore | None = None
        self._sender: WeightSender | None = None
        self._step = 0  # steps whose updates the weights have: the number of the next one

    # Forming a process group

    def offer_rendezvous(self, addresses: Sequence[str]) -> str:
        """Rank 0's meeting point for the others: a file in memory if all are on one host, else a free port."""
        if len(set(addresses)) == 1:
            # Of memory, so that no file is left of a rank that is killed; it is freed with this process.
            return f"file:///proc/{os.getpid()}/fd/{os.memfd_create('rft_cluster_learners')}"
        self._store = open_store(addresses[0])
        return f"tcp://{addresses[0]}:{self._store.port}"

    @within_memory("a learner", LESS)
    def join(self, rendezvous: str, addresses: Sequence[str], others: Sequence[str] | None = ()) -> None:
        """Join the process group at `rendezvous` and shard the model over it.

        Args:
            addresses: of all ranks' hosts, by rank, as Ray knows them.
            others: addresses of the other actors' hosts; None if hosts may join later that nobody knows yet.

        Raises:
            UserError: another rank cannot be reached from here, or no interface has this host's address.
        """
        self._ranks, self._address = len(addresses), addresses[self._rank]
        self._one_host = one_host = len(set(addresses)) == 1
        configured = self._config.cluster.interface
        # A rank waits for the slowest of all, so no shorter than for a call: torch's default is 10 minutes for NCCL.
        timeout = timedelta(seconds=self._config.cluster.step_timeout)
        os.environ["GLOO_SOCKET_IFNAME"] = interface = interface_to(addresses, self._address, configured)
        if self._device.type == "cuda":
            # NCCL reads this once a process, and learner 0 also meets the generators through NCCL.
            everybody = [*addresses, *(["a host to come"] if others is None else others)]
            os.environ["NCCL_SOCKET_IFNAME"] = exactly(interface_to(everybody, self._address, configured))
        form = partial(
            dist.init_process_group,
            backend=self._hardware.process_group,
            rank=self._rank,
            world_size=self._ranks,
            timeout=timeout,
        )
        if one_host:
            form(init_method=rendezvous)
        else:
            store = self._store or reach_store(rendezvous, self._rank, self._address)
            with connections(store, self._rank, self._ranks, interface):
                form(store=store)
        self._shard(self._policy)
        if self._reference:
            self._shard(self._reference)
        settings = self._config.optimizer
        self._optimizer = torch.optim.AdamW(
            [parameter for parameter in self._policy.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def _shard(self, policy: PolicyModel) -> None:
        mesh = init_device_mesh(self._device.type, (self._ranks,))
        compute = getattr(torch, self._hardware.dtype)
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy() if self._config.learners.cpu_offload else OffloadPolicy()
        for unit in [*policy.shard_units(), policy]:
            fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the loss is a sum
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces

    # Training

    @within_memory("a learner", LESS)
    def update(self, work: RankWork, step: int) -> LearnerStats:
        """Make the optimizer updates of one step on this rank's samples: `work[update][micro_batch]`.

        Raises:
            RepeatedUpdate: the weights already have the updates of `step`. (Steps may be left out: one without samples
                makes no call.)
        """
        if step < self._step:
            raise RepeatedUpdate(f"learner {self._rank}: update {step} is asked for, but the next one is {self._step}")
        self._step = step + 1  # from here on: an update that ends in an error is not made again, either
        if not self._config.data.augment.recurs:
            self._prompts.forget_augmented()
        held, started = self._held_memory(), time.monotonic()
        optimizer = self._config.optimizer
        learning_rate = optimizer.learning_rate * learning_rate_factor(
            step, optimizer.warmup_steps, self._config.schedule.steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # The old policy is the one at the start of the step. With one update it is the current one, so its
        # log-probabilities need no forward; with more, compute them ([C] a micro-batch) before the first update.
        old = None
        if len(work) > 1 and self._config.algorithm.samples:
            old = [[self._logprobs(self._policy, batch) for batch in self._batches(update)] for update in work]

        parts, norms, skipped = [LearnerStats()], [0.0], 0
        for i, update in enumerate(work):
            for j, batch in enumerate(self._batches(update)):
                # Gradients accumulate over micro-batches. FSDP adds them up over ranks in each backward.
                part = self._backward(batch, old[i][j] if old else None)
                parts.append(part if math.isfinite(part.loss) else replace(part, not_finite=prompts_of(update[j])))
            norm = self._clip_gradients()  # of the whole gradient, before clipping
            if torch.isfinite(norm):
                self._optimizer.step()
                norms.append(float(norm))
            else:
                # Skip an update with NaN or infinity, which would ruin the weights for good. The norm covers all ranks
                # and, by `_backward`, their losses, so either all skip or none.
                skipped += 1
            self._optimizer.zero_grad()
        total, (memory, activations) = reduced(parts), self._peak_memory(held)
        stats = replace(
            total,
            loss=total.loss / len(work),
            grad_norm=max(norms),
            learning_rate=learning_rate,
            updates=len(work),
            skipped=skipped,
            finite_weights=self._weights_are_finite(),
            memory_gib=memory,
            activation_gib=activations,
        )
        _log_update(step + 1, stats, len(work), time.monotonic() - started)
        return stats

    def _backward(self, batch: Batch, old_logprobs: Tensor | None) -> LearnerStats:
        """Add one micro-batch to the gradient. Without `old_logprobs` [C] the old policy is the current one."""
        settings = self._config.algorithm
        reference = self._reference_logprobs(batch) if settings.kl_beta else None
        logprobs, entropy = self._policy(**batch.inputs())  # [C] each
        if settings.samples:
            terms = grpo_loss(logprobs, batch, logprobs if old_logprobs is None else old_logprobs, reference, settings)
        else:
            terms = sft_loss(logprobs, batch)
        # A loss that is not finite may have a finite gradient: the derivative of a clamped infinity is 0. But the
        # gradient is all that the other ranks see of the loss.
        loss = terms.loss if math.isfinite(terms.sums.loss) else terms.loss * math.nan
        loss.backward()
        return LearnerStats(
            **asdict(terms.sums),
            entropy=float(entropy[batch.weights > 0].sum()),
            logprob_gaps=() if terms.gaps is None else completion_gaps(batch.completions, terms.gaps),
        )

    def _held_memory(self) -> int:
        """Bytes of the GPU's memory that are allocated before a step. Resets the peak."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak_memory(self, held: int) -> tuple[float, float | None]:
        """`memory_gib` and `activation_gib` of `LearnerStats`. A CPU process only knows its peak since the start."""
        if self._device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, None
        peak = torch.cuda.max_memory_allocated()
        return peak / GIB, (peak - held) / GIB

    def _batches(self, update: Sequence[list[TrainingSample]]) -> Iterator[Batch]:
        """Yield an update's micro-batches on the device. Each is collated while the previous one is computed."""
        coming: deque[Future[Batch]] = deque()
        for samples in update:
            coming.append(self._collating.submit(self._collate, samples))
            if len(coming) > 1:
                yield coming.popleft().result()
        if coming:
            yield coming.popleft().result()

    def _collate(self, samples: list[TrainingSample]) -> Batch:
        return collate(samples, self._prompts, self._policy.prompt_positions).to(self._device)

    @torch.no_grad()
    def _logprobs(self, policy: PolicyModel, batch: Batch) -> Tensor:
        return policy(**batch.inputs())[0]

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if self._reference:
            return self._logprobs(self._reference, batch)
        with base_model(self._policy) as base:
            return self._logprobs(base, batch)

    def _clip_gradients(self) -> Tensor:
        norm = clip_grad_norm_(self._policy.parameters(), self._config.optimizer.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def _weights_are_finite(self) -> bool:
        """Whether this rank's shards are finite in BF16, the form in which they are sent and exported."""
        parameters = [parameter for parameter in self._policy.parameters() if parameter.requires_grad]
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        highest = get_total_norm([shard for shard in shards if shard.numel()], math.inf)
        return bool(highest <= torch.finfo(WIRE_DTYPE).max)  # False for NaN

    # Sending weights

    def offer_weights(self, generator_ranks: int) -> WeightOffer:
        """Make the offer for the generators; the driver uses rank 0's. `weights.sender` explains this and the next four
        methods."""
        if self._sender is None:
            self._sender = self._make_sender()
        return self._sender.offer(generator_ranks)

    def _make_sender(self) -> WeightSender:
        weights = PolicyWeights(self._policy)
        match self._hardware.transfer:
            case "nccl":
                return NCCLSender(weights, self._address)
            case "ipc":
                return IPCSender(weights)
            case _:
                return SharedMemorySender(weights, self._one_host)

    @property
    def _weights_out(self) -> WeightSender:
        assert self._sender is not None, "offer_weights comes first"
        return self._sender

    @within_memory("a learner", LESS)
    def connect_weights(self, forward: Forward | None) -> None:
        self._weights_out.connect(forward)

    @within_memory("a learner", LESS)
    def publish_weights(self) -> None:
        """Send the current weights. The driver starts the receiving end."""
        started = time.monotonic()
        self._weights_out.send()
        print(f"transfer: weights after step {self._step} sent, {time.monotonic() - started:.1f} s", flush=True)

    def weight_digests(self) -> dict[str, int]:
        return self._weights_out.digests()

    def weight_bytes(self) -> np.ndarray:
        """The published shared memory, [bytes] uint8, for generators on other hosts. Rank 0 only."""
        assert isinstance(self._sender, SharedMemorySender)
        return self._sender.contents()

    def free_memory(self) -> None:
        """Free the allocator's cached memory, for an engine on the same GPU."""
        if self._device.type == "cuda":
            # vLLM's IPC buffer (1 GiB or more) can be freed once the engine has ended the update and closed its handle.
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    # Snapshots and files

    def snapshot(self, step: int) -> tuple[Snapshot, int]:
        """This rank's state after `step` steps; and the step, which comes to the driver as the news that the state is
        stored. Ray stores it before this rank's next call."""
        return take_snapshot(self._rank, step, self._policy, self._optimizer), step

    def state_bytes(self) -> int:
        """Size of this rank's file of a checkpoint, but for its header."""
        return state_bytes(self._policy, self._optimizer)

    @within_memory("a learner", LESS)
    def restore_snapshot(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of this rank, among as many ranks."""
        self._step = snapshot.step
        put_back(snapshot, self._policy, self._optimizer)

    @within_memory("a learner", LESS)
    def restore_checkpoint(self, folder: str, updates: int, step: int) -> None:
        """Continue from a checkpoint of `step`, which has seen `updates` optimizer updates."""
        self._step = step
        load_shards(Path(folder), self._policy, self._optimizer)
        set_optimizer_updates(self._optimizer, updates)

    @within_memory("a learner", LESS)
    def export(self, folder: str) -> None:
        export_model(Path(folder), self._policy, self._encoder, is_writer=self._rank == 0)
