"""A run's events as TensorBoard's own reader has them, the one that serves its pages."""

import io
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray


def read(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    return found


def curve(found: EventAccumulator, tag: str) -> dict[int, float]:
    points = [(event.step, float(make_ndarray(event.tensor_proto))) for event in found.Tensors(tag)]
    assert len(dict(points)) == len(points), "a step is there twice"
    return dict(points)


def images(found: EventAccumulator, tag: str) -> dict[int, Image.Image]:
    pictures = {}
    for event in found.Tensors(tag):
        width, height, png = make_ndarray(event.tensor_proto)
        pictures[event.step] = Image.open(io.BytesIO(png))
        assert pictures[event.step].size == (int(width), int(height))
    return pictures
