"""Three updates of one learner, as in a run: FSDP2 on one rank, with reference and Adam, in a process of its own.

The gradient of the first update is compared with one computed in the plain way: no FSDP, FP32 throughout, one group at
a time, and the loss written out anew.
"""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import in_a_process
from benchmarks.gpu_check.checklist import Bench, once
from benchmarks.gpu_check.material import images, run_config, samples
from rft_cluster.config import Config
from rft_cluster.learner.collate import Batch, collate
from rft_cluster.learner.learner import GIB, Learner
from rft_cluster.learner.packing import by_prompt, split_work
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.learner.snapshot import write_shards
from rft_cluster.messages import TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.folder import read_shapes
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.numbers import MERGE
from rft_cluster.model.policy import load_policy
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.memory import learner_parts, total
from rft_cluster.plan.seconds import forward_flops, training_flops
from rft_cluster.plan.work import EMPTY, Row, group_row
from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.source import PolicyWeights

UPDATES = 3
PLAIN = {"text_config": "shared_prefix_sdpa", "vision_config": "sdpa"}
# The setting that a variant departs in from `flower102_1gpu`.
VARIANTS: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "checkpointing": ("learners.gradient_checkpointing=true",),
    "LoRA": ("model.lora.rank=64", "model.lora.alpha=128", "model.freeze_vision=true"),
}


@dataclass(frozen=True)
class Found:
    """The figures of a variant's updates.

    `gradient_error`: of the first update's whole gradient, relative to the plain one's norm. `sound`: all losses are
    finite, and no update was skipped. `wrong_moves`: of the `tensors`, those that were trained and did not move, and
    those that were not and did. `seconds`: of each update. `peak_gib`: of a GPU's memory, of a CPU process since its
    start; `planned_gib`: the plan's (`rft_cluster/plan`). `tokens`: in the rows of an update; `flops`: of an update;
    `kernels`: seconds of an update in which the GPU computes, of all weights only. `restored`, `exported`: tensors that
    differ after a checkpoint was read back, and in the exported folder; tried with LoRA only.
    """

    gradient_error: float
    sound: bool
    wrong_moves: int
    tensors: int
    seconds: list[float]
    peak_gib: float
    planned_gib: float
    tokens: float
    flops: float
    kernels: float = math.nan
    restored: int = 0
    exported: int = 0


@once
def updates(bench: Bench, variant: str) -> Found:
    """The updates of a variant, made once however many checks ask."""
    found: Found = by_itself(run_updates, bench, variant)
    return found


def by_itself(work: Callable[..., Any], bench: Bench, *arguments: Any) -> Any:
    """What `work(bench, *arguments)` returns in a process of its own, which finds the GPU as empty as this one can."""
    release(bench)
    return in_a_process(work, bench, *arguments, environment={})


def release(bench: Bench) -> None:
    """Give the GPU back what this process no longer needs."""
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


def variant_config(bench: Bench, variant: str) -> Config:
    tiny = ("learners.micro_batch_tokens=128", "schedule.prompts_per_step=4", "cluster.dtype=bfloat16")
    return run_config(bench, *VARIANTS[variant], *(tiny if bench.size == "tiny" else ()))


def run_updates(bench: Bench, variant: str) -> Found:
    config = variant_config(bench, variant)
    made = samples(bench, config, config.schedule.prompts_per_step)
    expected = plain_gradients(bench, config, made)
    release(bench)
    (work,) = split_work(made, 1, 1, config.learners.micro_batch_tokens)
    shapes = read_shapes(Path(config.model.path))
    with one_rank(bench, config) as learner:
        rows = [planned_row(learner, micro_batch) for micro_batch in work[0]]
        errors, before = gradient_errors(learner, expected), bits(learner)
        stats, seconds = [], []
        for step in range(UPDATES):
            started = time.perf_counter()
            stats.append(learner.update(work, step))
            torch.get_device_module(bench.device).synchronize()
            seconds.append(time.perf_counter() - started)
        found = Found(
            gradient_error=errors[0],
            sound=all(math.isfinite(one.loss) and not one.skipped for one in stats),
            wrong_moves=wrong_moves(learner, before),
            tensors=len(before),
            seconds=seconds,
            peak_gib=max(one.memory_gib for one in stats),
            planned_gib=planned_gib(shapes, config, rows),
            tokens=sum(row.tokens for row in rows),
            flops=update_flops(shapes, config, sum(rows, EMPTY)),
        )
        if variant == "all weights" and bench.device == "cuda":
            return replace(found, kernels=kernel_seconds(learner, work))
        if variant == "LoRA":  # its files are the smallest: the base in BF16, adapters and moments
            return replace(found, restored=restored(learner, work, bench), exported=exported(learner, config, bench))
        return found


def kernel_seconds(learner: Learner, work: Any) -> float:
    """Make one more update, print where its time goes on the GPU and on the host, and return the GPU's seconds."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        learner.update(work, UPDATES)
        torch.cuda.synchronize()
    events = profiler.key_averages()
    for order in ("self_cuda_time_total", "self_cpu_time_total"):
        print(events.table(sort_by=order, row_limit=40, max_name_column_width=80), flush=True)
    return sum(event.self_device_time_total for event in events) / 1e6


def bits(learner: Learner) -> list[int]:
    """A digest of every parameter to the bit, in its own dtype."""
    held = [parameter.detach() for parameter in learner._policy.parameters()]
    return [tensor_digest(local(tensor).view(torch.bfloat16)) for tensor in held]


def wrong_moves(learner: Learner, before: list[int]) -> int:
    trained = [parameter.requires_grad for parameter in learner._policy.parameters()]
    moved = [old != new for old, new in zip(before, bits(learner), strict=True)]
    return sum(one != other for one, other in zip(moved, trained, strict=True))


def local(tensor: Tensor) -> Tensor:
    """A rank's rows; with one rank the whole tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The distance of a gradient, in parts, from the wanted one, relative to the norm of that."""
    off = whole = 0.0
    for one, other in zip(found, wanted, strict=True):
        other = other.to(one.device)
        off += float((one - other).square().sum())
        whole += float(other.square().sum())
    return math.sqrt(off / whole)


def planned_gib(shapes: Shapes, config: Config, rows: list[Row]) -> float:
    """The plan's peak of an update, of the row that keeps most."""
    return max(total(learner_parts(shapes, config, row, len(rows)), "learn") for row in rows) / GIB


def planned_row(learner: Learner, micro_batch: list[TrainingSample]) -> Row:
    """A micro-batch in the plan's numbers."""
    row = EMPTY
    for part in by_prompt(micro_batch):
        image = len(learner._prompts.encode(part[0].prompt).pixel_values) // MERGE**2
        prompt = PromptLength(image, len(part[0].prompt_token_ids) - image)
        row += group_row(prompt, len(part), sum(len(sample.token_ids) for sample in part) / len(part))
    return row


def update_flops(shapes: Shapes, config: Config, row: Row) -> float:
    """FLOPs of an update: of the policy's forward and backward, and of the reference's forward."""
    return training_flops(shapes, config, row) + forward_flops(shapes, row)


@contextmanager
def one_rank(bench: Bench, config: Config) -> Iterator[Learner]:
    """A learner that is its process group's only rank."""
    torch.manual_seed(0)  # adapters are initialised randomly
    pictures = images(bench, config.schedule.prompts_per_step)
    learner = Learner(str(config.model.path), config, 0, threads=int(config.learners.cpus), images=pictures)
    with tempfile.TemporaryDirectory() as folder:
        learner.join(f"file://{folder}/rendezvous", ["127.0.0.1"])
        try:
            yield learner
        finally:
            dist.destroy_process_group()


# The gradient in the plain way


def plain_gradients(bench: Bench, config: Config, made: list[TrainingSample]) -> list[Tensor]:
    """The first update's gradient of each trained parameter, on the CPU: unsharded, FP32, a group at a time."""
    device, model = torch.device(bench.device), config.model
    encoder = PromptEncoder(str(model.path), model)
    prompts = PromptCache(encoder, images(bench, config.schedule.prompts_per_step), capacity=GIB)
    torch.manual_seed(0)
    policy = load_policy(str(model.path), model, PLAIN, encoder.forbidden_token_ids, 1.0).float().to(device)
    for group in by_prompt(made):
        batch = collate(group, prompts, policy.prompt_positions).to(device)
        plain_loss(policy(**batch.inputs())[0], batch, config).backward()
    return [parameter.grad.cpu() for parameter in policy.parameters() if parameter.requires_grad]


def plain_loss(logprobs: Tensor, batch: Batch, config: Config) -> Tensor:
    """The policy is the old one and the reference, too: all ratios are 1, and the KL's gradient is 0."""
    importance = (logprobs.detach() - batch.generator_logprobs).exp().clamp(max=config.algorithm.importance_cap)
    return -(importance * logprobs * batch.advantages * batch.weights).sum()


def gradient_errors(learner: Learner, expected: list[Tensor]) -> list[float]:
    """A list that gets each update's distance of the gradient from `expected`, relative to its norm."""
    errors: list[float] = []
    clip = learner._clip_gradients

    def compare() -> Tensor:
        found = [local(parameter.grad) for parameter in learner._policy.parameters() if parameter.requires_grad]
        errors.append(whole_error(found, expected))
        learner._clip_gradients = clip  # type: ignore[method-assign]
        return clip()

    learner._clip_gradients = compare  # type: ignore[method-assign]
    return errors


# Files


def restored(learner: Learner, work: Any, bench: Bench) -> int:
    """Write a checkpoint, make another update, read the checkpoint back: the number of tensors that differ."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        written = write_shards(folder, learner.snapshot(UPDATES)[0])
        saved = state(learner)
        learner.update(work, UPDATES)
        learner.restore_checkpoint(folder, written.updates, UPDATES)
    return sum(not torch.equal(one, other) for one, other in zip(saved, state(learner), strict=True))


def state(learner: Learner) -> list[Tensor]:
    """What training continues from, on the CPU: the trained weights and Adam's moments."""
    held = [parameter for parameter in learner._policy.parameters() if parameter.requires_grad]
    tensors = [*held, *(value for one in held for value in learner._optimizer.state[one].values())]
    return [local(tensor.detach()).cpu().clone() for tensor in tensors]


def exported(learner: Learner, config: Config, bench: Bench) -> int:
    """Export the policy and load it as a model: the number of tensors that differ."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        learner.export(folder)
        plain = config.model.model_copy(update={"lora": None})
        policy = load_policy(folder, plain, PLAIN, [], 1.0)
    found = {name: tensor_digest(tensor) for name, tensor in PolicyWeights(policy)}
    return sum(found.get(name) != tensor_digest(tensor) for name, tensor in PolicyWeights(learner._policy))
