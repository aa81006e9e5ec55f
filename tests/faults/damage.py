"""Change what lies on a disk or in a memory, or take it away."""

import json
import os
import shutil
from pathlib import Path
from typing import IO


def place_of(shard: Path, kind: str) -> int:
    """The offset of the first byte of a tensor whose name begins with `kind` in a safetensors file."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    return 8 + length + next(one["data_offsets"][0] for name, one in tensors.items() if name.startswith(kind))


def flip_bit(file: IO[bytes], offset: int) -> None:
    file.seek(offset)
    (byte,) = file.read(1)
    file.seek(offset)
    file.write(bytes([byte ^ 1]))


def damage(shard: Path, what: str) -> None:
    """Cut a shard of a checkpoint, or flip a bit of a weight or of a moment in it."""
    if what == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
        return
    with shard.open("r+b") as file:
        flip_bit(file, place_of(shard, {"weight": "policy.", "moment": "exp_avg."}[what]))


def only_journal(run: Path, copy: Path) -> Path:
    """A copy of a run that has its journal, and of its checkpoints the first."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model*", "baselines.json"))
    first, *others = sorted((copy / "checkpoints").iterdir())
    assert first.name == "step-000004"
    for checkpoint in others:
        shutil.rmtree(checkpoint)
    return copy
