"""Checkpoints of the learners, and the export of the policy as a Hugging Face folder. Safetensors and JSON only.

    checkpoints/step-000050/   state.json, and one or more .safetensors for each rank: FP32 masters and Adam moments
    model/                     config, tokenizer, processor, BF16 weights: loads in transformers and in vLLM

The shards are written from snapshots (snapshot.py). torch's Distributed Checkpoint reads them through its safetensors
storage (its default storage unpickles), so a run may resume with another number of ranks. A folder is written under a
temporary name, and the driver renames it when every rank's file is there. A folder with the final name is therefore
complete.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import write_json
from rft_cluster.learner.snapshot import Shard, Snapshot
from rft_cluster.model.computing import NO_MEMORY
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import PolicyModel
from rft_cluster.weights.source import PolicyWeights

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # of masters; of LoRA's base
MOMENTS = ("exp_avg", "exp_avg_sq")


def take_snapshot(rank: int, step: int, policy: PolicyModel, optimizer: Optimizer) -> Snapshot:
    """This rank's state. On the CPU the snapshot shares the memory of the tensors: use it before the next update."""
    shards = {name: _shard(tensor) for name, tensor in _tensors(policy, optimizer).items()}
    return Snapshot(rank, step, optimizer_updates(optimizer), shards)


def state_bytes(policy: PolicyModel, optimizer: Optimizer) -> int:
    """Size of this rank's part of the state."""
    return sum(_local(tensor).nbytes for tensor in _tensors(policy, optimizer).values())


def put_back(snapshot: Snapshot, policy: PolicyModel, optimizer: Optimizer) -> None:
    """Restore the state of a snapshot, bit for bit. The number of ranks is that of the snapshot."""
    for name, tensor in _tensors(policy, optimizer).items():
        shard, local = snapshot.shards[name], _local(tensor)
        # Copied once more, because the memory of the object store is read-only.
        local.copy_(torch.from_numpy(shard.data.copy()).view(local.dtype).view(local.shape))
    set_optimizer_updates(optimizer, snapshot.updates)


def optimizer_updates(optimizer: Optimizer) -> int:
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_optimizer_updates(optimizer: Optimizer, updates: int) -> None:
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(updates))


def _shard(tensor: Tensor) -> Shard:
    offsets = (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # as Distributed Checkpoint asks every sharded tensor
        offsets = tuple(chunk.offsets)
    local = _local(tensor).contiguous().cpu()
    return Shard(local.flatten().view(torch.uint8).numpy(), DTYPES[local.dtype], tuple(local.shape), offsets)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_shards(folder: Path, policy: PolicyModel, optimizer: Optimizer) -> None:
    """Read a checkpoint into the policy and the optimizer, whatever the number of ranks that wrote it.

    Raises:
        OSError: the system did not let a rank read it. The same on all ranks.
        UserError: a rank cannot make sense of it. The same on all ranks.
    """
    try:
        with _errors_of_the_system(folder):
            dcp.load(_tensors(policy, optimizer), storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as found:  # what each rank raised, for all; a BaseException
        errors = {rank: error for rank, (error, _) in sorted(found.failures.items())}
        if number := next(filter(None, map(_error_number, errors.values())), None):
            raise OSError(number, os.strerror(number), str(folder)) from found
        rank, error = next(iter(errors.items()))
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY):
            raise error from found  # `within_memory` says what to do
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder} cannot be read by learner-{rank} ({type(error).__name__}: {reason}): remove that folder to go "
            f"on from the checkpoint before"
        ) from found


@contextmanager
def _errors_of_the_system(folder: Path) -> Iterator[None]:
    """Turn errors of the system within this context (a full disk) into OSError with the folder's name."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if number := _error_number(error):
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def _error_number(error: BaseException) -> int | None:
    """The errno of an error of the system, which safetensors puts into a text; None of other errors."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(told[1]) if told else None


def _tensors(policy: PolicyModel, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {f"policy.{name}": parameter.detach() for name, parameter in policy.model.named_parameters()}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            for moment in MOMENTS:
                # AdamW creates its state in its first update. Before that, save zeros as moments.
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter)
                tensors[f"{moment}.{name}"] = state[moment]
            state.setdefault("step", torch.tensor(0.0))
    return tensors


def export_model(folder: Path, policy: PolicyModel, encoder: PromptEncoder, is_writer: bool) -> None:
    """Write the policy in BF16 as a Hugging Face folder. A collective; rank 0 is the writer."""
    # Gather one tensor at a time. Only the writer keeps it, on the CPU.
    full: dict[str, Tensor] = {}
    for name, tensor in PolicyWeights(policy):
        if is_writer:
            full[name] = tensor.cpu()
    if not is_writer:
        return
    with _errors_of_the_system(folder):
        policy.model.save_pretrained(folder, state_dict=full)
    config_file = folder / "config.json"
    config: dict[str, Any] = json.loads(config_file.read_text())
    # Undo two settings of training in the exported config: no KV cache, and the dtype of FP32 masters.
    config["dtype"] = "bfloat16"
    for section in (config, config.get("text_config", {})):
        section.pop("use_cache", None)
    write_json(config_file, config)
    encoder.save(folder)
