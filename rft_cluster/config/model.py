"""The section `model`: which model is trained, how, and how large it sees images."""

from typing import Literal

from pydantic import Field, model_validator

from rft_cluster.config.base import PathText, Section
from rft_cluster.config.bounds import MOST_IMAGE_TOKENS, MOST_PIXELS, MOST_TOKENS


class LoraSection(Section):
    """Train low-rank adapters of the language model's linear layers instead of the weights (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, le=4096)
    """Of the adapters' two matrices; all linear layers of the language model have an adapter."""
    alpha: int = Field(32, ge=1, le=65_536)
    """An adapter's output is scaled by alpha / rank."""


class ModelSection(Section):
    path: PathText
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL: a folder or a hub name. Or `tiny`: a small one, built for the data set."""
    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] | None = None
    """Of the model that `path: tiny` builds, `qwen2_vl` if left out. The `config.json` of others tells theirs."""
    freeze_vision: bool = False
    """Train the language model alone: less memory, and the vision tower stays as it is."""
    lora: LoraSection | None = None
    """Generators get the merged weights by the same transfer. The export is merged, too."""
    min_image_tokens: int | None = Field(None, ge=1, le=MOST_IMAGE_TOKENS)
    max_image_tokens: int | None = Field(None, ge=1, le=MOST_IMAGE_TOKENS)
    """Images are resized to between so many tokens, 4 and 512 if left out. One is made of 28 x 28 pixels, or of 32 x 32
    by Qwen3-VL."""
    min_pixels: int | None = Field(None, ge=28 * 28, le=MOST_PIXELS)
    max_pixels: int | None = Field(None, ge=28 * 28, le=MOST_PIXELS)
    """The limits of earlier versions' files, in place of those in tokens. One that is left out is 3136, or 401408."""
    max_prompt_tokens: int = Field(1024, ge=16, le=MOST_TOKENS)
    """Includes the image's tokens, and those of listed classes: 4.5 for each name of Flower102, with Qwen's vocabulary.
    A longer prompt is refused, never cut."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ModelSection":
        tokens = {"min_image_tokens": self.min_image_tokens, "max_image_tokens": self.max_image_tokens}
        pixels = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        in_tokens, in_pixels = ([key for key, limit in limits.items() if limit] for limits in (tokens, pixels))
        if in_tokens and in_pixels:
            raise ValueError(
                f"{' and '.join(in_pixels)} cannot be set beside {' and '.join(in_tokens)}: give the number of tokens "
                f"alone, which is that of pixels over 784, or over 1024 for a Qwen3-VL"
            )
        (lower, upper), (low, high) = (pixels, self.pixels(28)) if in_pixels else (tokens, self.image_tokens)
        if low > high:
            raise ValueError(f"{lower} {low} is above {upper} {high}")
        if self.family and self.path != "tiny":
            raise ValueError(f"family {self.family} is for path: tiny alone; {self.path} has a config.json")
        return self

    @property
    def image_tokens(self) -> tuple[int, int]:
        """The fewest and the most of a resized image, where limits are in tokens."""
        return self.min_image_tokens or 4, self.max_image_tokens or 512

    def pixels(self, side: int) -> tuple[int, int]:
        """The fewest and the most pixels of a resized image. `side`: pixels of an image token's side."""
        low, high = self.image_tokens
        if self.min_pixels or self.max_pixels:  # of times when each token had 28 x 28
            return self.min_pixels or low * 28**2, self.max_pixels or high * 28**2
        return low * side**2, high * side**2

    def pixels_note(self, side: int) -> str:
        """What to write in place of limits in pixels, e.g. for a log; empty if they are in tokens."""
        if not (self.min_pixels or self.max_pixels):
            return ""
        limits = self.pixels(side)
        low, high = (max(1, pixels // side**2) for pixels in limits)
        return (
            f"image limits are in pixels ({limits[0]} to {limits[1]}): write model.min_image_tokens={low} "
            f"model.max_image_tokens={high} in their place, tokens of {side} x {side} pixels"
        )
