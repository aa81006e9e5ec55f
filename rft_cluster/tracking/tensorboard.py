"""TensorBoard: `tensorboard --logdir runs`. The events of a run are in `runs/NAME/tensorboard/`.

The package's own protocol buffers and record writer are used, without its writer's second thread. tensorboardX and
torch's writer import torch, which the driver does without.
"""

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.common.files import write_bytes
from rft_cluster.common.text import printable
from rft_cluster.run.metrics import StepStats
from rft_cluster.run.tracker import Tracker
from rft_cluster.tracking.figures import Shown, evaluation_curves, meanings, step_curves
from rft_cluster.tracking.pictures import KEYS, MOST_LINES, worth

FOLDER = "tensorboard"
NAME = "events.out.tfevents."  # by which TensorBoard knows its files; the rest orders them
VERSION = "brain.Event:2"  # the first event's; without it TensorBoard takes the file for one of an old format


class TensorBoard(Tracker):
    """A `Tracker` that writes event files."""

    def __init__(self, run: Path, shown: Shown) -> None:
        self._folder, self._shown = run / FOLDER, shown
        self._file: BinaryIO | None = None
        self._meanings: dict[str, str] = {}  # of curves without a point yet: TensorBoard takes that of the first one

    def begin(self, first_step: int) -> None:
        """Begin a new file. Events of the steps that will be done again are removed from the older ones."""
        self.close()
        self._folder.mkdir(exist_ok=True)
        for file in sorted(self._folder.glob(f"{NAME}*")):
            drop_after(file, first_step)
        # Not buffered: a live TensorBoard sees each step, and a crash loses none.
        self._file = (self._folder / f"{NAME}{time.time_ns():020d}").open("xb", buffering=0)
        self._write(0, {"file_version": VERSION})
        self._meanings = meanings()

    def step(self, stats: StepStats) -> None:
        self._curves(stats.step, step_curves(stats))

    def evaluation(self, evaluation: Evaluation, judged: Sequence[Judged]) -> None:
        self._curves(evaluation.step, evaluation_curves(evaluation))
        self._image(evaluation.step, f"{evaluation.split}/confusion", self._shown.confusion(evaluation, judged))

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pictures = self._shown.pictures(step, rows)
        for number, picture in enumerate(pictures, 1):
            self._image(step, f"rollouts/{number}", picture)
        if pictures:
            self._text(step, "rollouts", completions_table(rows[: len(pictures)]))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _curves(self, step: int, curves: Mapping[str, float]) -> None:
        from tensorboard.plugins.scalar.metadata import create_summary_metadata

        values = []
        for tag, value in curves.items():
            general = f"{tag.rpartition('/')[0]}/NAME"
            meaning = self._meanings.pop(tag, None) or self._meanings.get(general)
            data = create_summary_metadata(display_name=None, description=meaning)
            values.append({"tag": tag, "simple_value": value, "metadata": data})
        self._write(step, {"summary": {"value": values}})

    def _image(self, step: int, tag: str, png: bytes) -> None:
        from tensorboard.plugins.image.metadata import create_summary_metadata

        size = Image.open(io.BytesIO(png)).size
        strings = [*(str(side).encode() for side in size), png]  # the form that TensorBoard's image plugin reads
        self._strings(step, tag, strings, create_summary_metadata(display_name=None, description=None))

    def _text(self, step: int, tag: str, markdown: str) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata

        self._strings(step, tag, [markdown.encode()], create_summary_metadata(display_name=None, description=None))

    def _strings(self, step: int, tag: str, strings: Sequence[bytes], metadata: Any) -> None:
        from tensorboard.util.tensor_util import make_tensor_proto

        value = {"tag": tag, "tensor": make_tensor_proto(strings), "metadata": metadata}
        self._write(step, {"summary": {"value": [value]}})

    def _write(self, step: int, content: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None, "begin() comes first"
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._file.write(record.getvalue())


def drop_after(file: Path, last_step: int) -> None:
    """Remove the events after `last_step` from an event file, which is replaced if there are any."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    if file.is_symlink() or not file.is_file():  # in a stranger's folder a link may lead to any file
        return
    kept, dropped = io.BytesIO(), False
    for step, event in events_in(file):
        if step <= last_step:
            RecordWriter(kept).write(event)
        dropped |= step > last_step
    if dropped:
        write_bytes(file, kept.getvalue())


def events_in(file: Path) -> Iterator[tuple[int, bytes]]:
    """(step, serialised event) of each whole record; the last may be cut by a crash."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for event in RawEventFileLoader(str(file)).Load():
        yield Event.FromString(event).step, event


def completions_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The completions of groups as a table in Markdown, `MOST_LINES` of each, with every text literal."""
    head = "| image | label | reward, advantage | completion | why |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| {literal(row['example_id'])} | {literal(row['label'])} | {literal(worth(reward, advantage))} "
        f"| {literal(text)} | {literal(why)} |\n"
        for row in rows
        for text, reward, advantage, why in zip(*(row[key][:MOST_LINES] for key in (*KEYS, "why")), strict=True)
    )


def literal(text: str) -> str:
    """A text for Markdown and HTML: whatever has a meaning there becomes a numeric entity."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in printable(text))
