"""The size to which Qwen2-VL resizes an image, and its number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from rft_cluster.common.imports import light_imports
from rft_cluster.data.shown import View
from rft_cluster.model.families.qwen2_vl import PATCH
from rft_cluster.model.numbers import MERGE

SIDE = PATCH * MERGE  # pixels of an image token's side


@dataclass(frozen=True)
class PromptLength:
    """The tokens of a prompt: of its image, and of all the rest."""

    image: int
    text: int

    @property
    def tokens(self) -> int:
        return self.image + self.text


def model_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels, multiples of 28, to which an image is resized. One is 0 if the image is too narrow for
    `max_pixels`."""
    tall, wide = _smart_resize()(height, width, factor=SIDE, min_pixels=min_pixels, max_pixels=max_pixels)
    return wide, tall


@cache
def _smart_resize() -> Callable[..., tuple[int, int]]:
    """Import `smart_resize` on first use: the import of torch takes seconds."""
    with light_imports():
        from qwen_vl_utils import smart_resize
    return smart_resize


def view_of(min_pixels: int, max_pixels: int) -> View:
    return View(max_pixels, partial(model_size, min_pixels=min_pixels, max_pixels=max_pixels))


def image_tokens(width: int, height: int) -> int:
    """The number of tokens of an image with this `model_size`."""
    return (width // SIDE) * (height // SIDE)
