"""Qwen3-VL: patches of 16 pixels, learned positions in the vision tower, and features of three of its layers that are
added after the first text layers ("deepstack"). Queries and keys are normalised; the text layers have no biases."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from rft_cluster.model.families.family import Family, layers_alone
from rft_cluster.model.numbers import Layers, OwnWidthNumbers, TextNumbers, Width

if TYPE_CHECKING:
    from torch import nn

PATCH = 16


class Qwen3Text(TextNumbers):
    query_key_norm: ClassVar[bool] = True
    head_dim: Width = 128

    @property
    def head(self) -> int:
        return self.head_dim


class Qwen3Vision(OwnWidthNumbers):
    inner_kept: ClassVar[int] = 2
    depth: Layers = 27
    hidden_size: Width = 1152
    intermediate_size: Width = 4304
    patch_size: int = Field(PATCH, ge=PATCH, le=PATCH)
    num_position_embeddings: int = Field(2304, ge=1, le=1_048_576)
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)

    @field_validator("num_position_embeddings")
    @classmethod
    def _square(cls, positions: int) -> int:
        if math.isqrt(positions) ** 2 != positions:
            raise ValueError("must be a square number")
        return positions

    @property
    def learned_positions(self) -> int:
        return self.num_position_embeddings

    @property
    def deepstack(self) -> int:
        return len(self.deepstack_visual_indexes)


def shard_units(model: Any) -> list["nn.Module"]:
    """The mergers of deepstack, too: in the 2B each has as many parameters as two vision blocks."""
    return [*layers_alone(model), *model.model.visual.deepstack_merger_list]


QWEN3_VL = Family(
    model_type="qwen3_vl",
    name="Qwen3-VL",
    published=tuple(f"Qwen/Qwen3-VL-{size}-{kind}" for size in ("2B", "4B", "8B") for kind in ("Instruct", "Thinking")),
    config_class="Qwen3VLConfig",
    model_class="Qwen3VLForConditionalGeneration",
    processor_class="Qwen3VLProcessor",
    video_processor_class="Qwen3VLVideoProcessor",
    patch=PATCH,
    normal=((0.5,) * 3, (0.5,) * 3),
    text=Qwen3Text,
    vision=Qwen3Vision,
    beside_layers=(
        *("embed_tokens.weight", "language_model.norm.weight", "visual.pos_embed.weight"),
        *("visual.patch_embed.proj.weight", "visual.patch_embed.proj.bias", "visual.merger.linear_fc1.weight"),
    ),
    tiny_text=lambda width: {
        "head_dim": width // 4,
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4},
            **{"mrope_interleaved": True, "mrope_section": [6, 5, 5]},
        },
    },
    tiny_vision=lambda width: {
        **{"hidden_size": 96, "intermediate_size": 192, "out_hidden_size": width},
        **{"num_position_embeddings": 8 * 8, "deepstack_visual_indexes": [0, 1]},
    },
    shard_units=shard_units,
)
