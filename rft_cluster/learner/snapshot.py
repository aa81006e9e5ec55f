"""A learner's state in memory, and the file of a checkpoint that it becomes.

The file is in safetensors, with the offsets that torch's Distributed Checkpoint looks for, so that any number of ranks
can read it. No torch here: the processes that write these files would take seconds and 300 MB to import it.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from rft_cluster.common.files import naming
from rft_cluster.messages import WrittenFile


@dataclass(frozen=True)
class Shard:
    """One rank's part of a tensor."""

    data: np.ndarray  # [bytes] uint8
    dtype: str  # as safetensors names it: F32, BF16
    shape: tuple[int, ...]
    offsets: tuple[int, ...]  # of the part's first element in the whole tensor


@dataclass(frozen=True)
class Snapshot:
    """One rank's state after `step` steps and `updates` optimizer updates."""

    rank: int
    step: int
    updates: int
    shards: Mapping[str, Shard]
    """`policy.NAME` of all parameters, `exp_avg.NAME` and `exp_avg_sq.NAME` of the trained ones."""


def kept(snapshot: Snapshot) -> tuple[Snapshot, int]:
    """A copy on the node where this runs; and the step, as the news that it is there."""
    return snapshot, snapshot.step


def write_shards(folder: str, snapshot: Snapshot) -> WrittenFile:
    """Write a rank's file of a checkpoint. When this returns, the bytes are on the disk.

    Equal snapshots give equal bytes. (The library's own writer copies all tensors once more, and orders the keys of the
    header at random.)

    Raises:
        OSError: with the file's name.
    """
    file = Path(folder) / shards_file(snapshot.rank)
    digest, length, started = hashlib.sha256(), 0, time.monotonic()
    with naming(file), file.open("wb") as opened:
        for part in _parts(snapshot.shards):
            opened.write(part)
            digest.update(part)
            length += len(part)
        opened.flush()
        os.fsync(opened.fileno())
    return WrittenFile(file.name, length, digest.hexdigest(), snapshot.updates, time.monotonic() - started)


def shards_file(rank: int) -> str:
    """The name that torch's storage gives a rank's file; it counts from 1."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def _parts(shards: Mapping[str, Shard]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the header's length (8 bytes, little-endian), the header, the tensors."""
    ends = accumulate((shard.data.nbytes for shard in shards.values()), initial=0)
    tensors = {
        name: {"dtype": shard.dtype, "shape": shard.shape, "data_offsets": places}
        for (name, shard), places in zip(shards.items(), pairwise(ends), strict=True)
    }
    # Offsets as `_hf_utils` of torch.distributed.checkpoint names them.
    offsets = {name: {"saved_offsets": shard.offsets} for name, shard in shards.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8
    yield len(header).to_bytes(8, "little")
    yield header
    for shard in shards.values():
        yield shard.data.data
