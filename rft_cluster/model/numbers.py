"""Check the numbers in a model's config.json against ranges and against its weights, before memory is allocated."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown

MERGE = 2  # patches of an image token's side
FRAMES = 2  # an image is encoded as two equal video frames
Width = Annotated[int, Field(ge=1, le=65_536)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Layers = Annotated[int, Field(ge=1, le=512)]
Token = Annotated[int, Field(ge=0, le=2_000_000)]
Small = Annotated[float, Field(ge=0, le=1)]


class Numbers(BaseModel):
    """The numbers that are checked. Defaults are those of transformers' Qwen2-VL. Other keys are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)


N = TypeVar("N", bound=Numbers)


class _Rope(Numbers):
    mrope_section: list[Annotated[int, Field(ge=0, le=4096)]] = Field([16, 24, 24], max_length=3)
    rope_theta: float = Field(1e6, gt=0, le=1e10)


class _Tokens(Numbers):
    bos_token_id: Token | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None
    image_token_id: Token | None = None
    video_token_id: Token | None = None
    vision_token_id: Token | None = None
    vision_start_token_id: Token | None = None
    vision_end_token_id: Token | None = None


class TextNumbers(_Tokens, ABC):
    """The numbers that every language model has. A family adds those of its own.

    `query_key_norm`: queries and keys are normalised, head by head, and no linear layer of a text layer has a bias.
    """

    query_key_norm: ClassVar[bool] = False
    vocab_size: int = Field(152_064, ge=1, le=2_000_000)
    hidden_size: Width = 8192
    intermediate_size: int = Field(29_568, ge=1, le=1_000_000)
    num_hidden_layers: Layers = 80
    num_attention_heads: Heads = 64
    num_key_value_heads: Heads | None = 8
    max_position_embeddings: int = Field(32_768, ge=1, le=1_048_576)
    max_window_layers: int = Field(80, ge=0, le=10_000)
    sliding_window: int | None = Field(None, ge=0, le=1_048_576)
    attention_dropout: Small = 0
    rms_norm_eps: Small = 1e-5
    initializer_range: Small = 0.02
    rope_theta: float = Field(1e6, gt=0, le=1e10)
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None

    def weights(self) -> int:
        """A lower bound of the number of parameters: the embedding and the layers' matrices."""
        attention = 2 * self.hidden_size * (self.query + self.key)
        matrices = attention + 3 * self.hidden_size * self.intermediate_size
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * matrices

    @property
    @abstractmethod
    def head(self) -> int:
        """Width of a head."""

    @property
    def query(self) -> int:
        """Width of all heads' queries together."""
        return self.head * self.num_attention_heads

    @property
    def key(self) -> int:
        """Width of all heads' keys together."""
        return self.head * (self.num_key_value_heads or self.num_attention_heads)


class VisionNumbers(Numbers, ABC):
    """The numbers that every vision tower has. A family adds those of its own.

    `gated`: its layers have RMSNorm, and a gate, an up and a down projection, instead of LayerNorm and two layers.
    `inner_kept`: tensors of the MLP's inner width that autograd keeps.
    """

    gated: ClassVar[bool] = False
    inner_kept: ClassVar[int] = 3  # QuickGELU, of several operations, keeps one more than GELU
    depth: Layers = 32
    num_heads: Heads = 16
    initializer_range: Small = 0.02
    rope_parameters: _Rope | None = None
    in_channels: int = Field(3, ge=3, le=3)
    in_chans: int = Field(3, ge=3, le=3)
    spatial_merge_size: int = Field(MERGE, ge=MERGE, le=MERGE)
    temporal_patch_size: int = Field(FRAMES, ge=FRAMES, le=FRAMES)

    @property
    @abstractmethod
    def width(self) -> int:
        """Of the tower's hidden states."""

    @property
    @abstractmethod
    def inner(self) -> int:
        """Of its MLPs."""

    def weights(self) -> int:
        """A lower bound of the number of parameters."""
        return self.depth * (4 * self.width**2 + (3 if self.gated else 2) * self.width * self.inner)

    @property
    def learned_positions(self) -> int:
        """Positions of the learned table; such a tower's patch embedding has a bias."""
        return 0

    @property
    def deepstack(self) -> int:
        """Layers whose features are also added after the first text layers, each with a merger of its own."""
        return 0

    @property
    def window_patches(self) -> int:
        """Patches in a window of those layers that attend in windows."""
        return 0

    @property
    def windowed_layers(self) -> int:
        """The number of those layers."""
        return 0


class OwnWidthNumbers(VisionNumbers):
    """`hidden_size` is the vision tower's own width, `out_hidden_size` the language model's."""

    hidden_size: Width
    intermediate_size: Width
    out_hidden_size: Width = 3584

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def inner(self) -> int:
        return self.intermediate_size


class _Processor(Numbers):
    patch_size: int = 14
    merge_size: int = Field(MERGE, ge=MERGE, le=MERGE)
    temporal_patch_size: int = Field(FRAMES, ge=FRAMES, le=FRAMES)


T = TypeVar("T", bound=TextNumbers)
V = TypeVar("V", bound=VisionNumbers)


def least_weights(config: dict[str, Any], kinds: tuple[type[T], type[V]], file: Path) -> int:
    """A lower bound of the number of parameters of a model with this config.json.

    Raises:
        UserError: a number is out of its range.
    """
    text, vision = read_numbers(config, kinds, file)
    return text.weights() + vision.weights()


def read_numbers(config: dict[str, Any], kinds: tuple[type[T], type[V]], file: Path) -> tuple[T, V]:
    """The numbers of the language model and of the vision tower, `kinds` of a family. Older configurations have the
    former at the top level.

    Raises:
        UserError: a number is out of its range.
    """
    _checked(_Tokens, config, file)
    text = _checked(kinds[0], config.get("text_config") or config, file)
    if text.hidden_size % text.num_attention_heads:
        raise UserError(
            f"model.path: {file}: hidden_size {text.hidden_size} is no multiple of num_attention_heads "
            f"{text.num_attention_heads}"
        )
    return text, _checked(kinds[1], config.get("vision_config") or {}, file)


def check_processor(config: dict[str, Any], patch: int, file: Path) -> None:
    """Raise UserError if a processor's configuration has other patch sizes than its family's."""
    found = _checked(_Processor, config.get("image_processor") or config, file).patch_size
    if found != patch:
        raise UserError(f"model.path: {file}: patch_size: must be {patch}, got {found}")


def check_against(least: int, shapes: dict[str, list[int]], file: Path) -> None:
    """Raise UserError if config.json implies more parameters than the weight files have."""
    held = sum(math.prod(shape) for shape in shapes.values())
    if least > held:
        raise UserError(
            f"model.path: {file} describes a model of at least {least:,} parameters, but the weights beside it hold "
            f"{held:,}: the file is not these weights'"
        )


def _checked(model: type[N], values: Any, file: Path) -> N:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = shown(".".join(map(str, first["loc"])))
        raise UserError(f"model.path: {file}: {key}: {first['msg']}, got {shown(repr(first['input'])[:60])}") from error
