"""The size to which a model resizes an image, and its number of tokens. `side`: pixels of an image token's side."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from rft_cluster.common.imports import light_imports
from rft_cluster.data.shown import View


@dataclass(frozen=True)
class PromptLength:
    """The tokens of a prompt: of its image, and of all the rest."""

    image: int
    text: int

    @property
    def tokens(self) -> int:
        return self.image + self.text


def model_size(width: int, height: int, min_pixels: int, max_pixels: int, side: int) -> tuple[int, int]:
    """(width, height) in pixels, multiples of `side`, to which an image is resized. One is 0 if the image is too narrow
    for `max_pixels`."""
    tall, wide = _smart_resize()(height, width, factor=side, min_pixels=min_pixels, max_pixels=max_pixels)
    return wide, tall


@cache
def _smart_resize() -> Callable[..., tuple[int, int]]:
    """Import `smart_resize` on first use: the import of torch takes seconds."""
    with light_imports():
        from qwen_vl_utils import smart_resize
    return smart_resize


def view_of(min_pixels: int, max_pixels: int, side: int) -> View:
    return View(max_pixels, partial(model_size, min_pixels=min_pixels, max_pixels=max_pixels, side=side))


def image_tokens(width: int, height: int, side: int) -> int:
    """The number of tokens of an image with this `model_size`."""
    return (width // side) * (height // side)
