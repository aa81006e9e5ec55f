"""A run's folder as a run leaves it, without a cluster."""

import hashlib
import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from rft_cluster.common.files import FORMAT, sealed, write_json
from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.learner.snapshot import Shard, Snapshot, write_shards
from rft_cluster.messages import WrittenFile
from rft_cluster.prompts import Question, text_hash
from rft_cluster.run.checkpoints import checkpoint_folder
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.task import Task


def picture(colour: str | tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


EXAMPLES = [LabelledImage("a", picture("red"), "rose"), LabelledImage("b", picture("yellow"), "tulip")]
DATASET = FewShotDataset.of("photos", ["rose", "tulip"], EXAMPLES, [], [], [])
TASK = Task(DATASET, Question("Which flower?"))


def config(folder: Path, *overrides: str) -> Config:
    return load_config("digits", [f"run.folder={folder}", "run.name=mine", *overrides])


def begun(folder: Path, *overrides: str, first_step: int = 0) -> Path:
    return RunFolder(config(folder, *overrides), TASK, first_step).path


def shard(size: int) -> bytes:
    """A safetensors file of one tensor of `size` bytes."""
    head = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(range(256)) * (size // 256)


class Writing:
    """The writing of two ranks' files of a checkpoint, in this process, by `wait`."""

    def __init__(self, folder: Path, updates: int, done: bool = True, seconds: float = 0.0) -> None:
        """`seconds`: that it says to have taken."""
        self.folder, self.updates, self.done, self.seconds = folder, updates, done, seconds
        self.begins: Callable[[], None] = lambda: None

    def wait(self, seconds: float | None = None) -> list[WrittenFile]:
        self.begins()
        shards = {"x": Shard(np.arange(256, dtype=np.uint8), "U8", (256,), (0,))}
        snapshots = [Snapshot(rank, self.updates, self.updates, shards) for rank in (0, 1)]
        files = [write_shards(str(self.folder), snapshot) for snapshot in snapshots]
        return [replace(file, seconds=self.seconds) for file in files]


def checkpoint(run: Path, step: int, **state: object) -> Path:
    """One of two ranks; `state` is added to what is to be known of it."""
    path = checkpoint_folder(run, step)
    path.mkdir(parents=True)
    files = {f"shard-0000{rank}.safetensors": shard(512) for rank in (1, 2)}
    for name, content in files.items():
        (path / name).write_bytes(content)
    known = {"format": FORMAT, "step": step, "prompt_sha256": text_hash("Which flower?"), "optimizer_updates": step}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    sizes = {name: len(content) for name, content in files.items()}
    write_json(path / "state.json", sealed({**known, "files": sizes, "digests": digests, **state}))
    return path


def rewrite_state(folder: Path, **changes: object) -> None:
    """Change values of a checkpoint's state, with a seal that fits."""
    values = json.loads((folder / "state.json").read_text())
    values.pop("sha256", None)
    write_json(folder / "state.json", sealed({**values, **changes}))
