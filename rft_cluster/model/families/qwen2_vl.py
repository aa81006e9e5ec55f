"""Qwen2-VL: every vision layer attends to the whole image; LayerNorm and an MLP of two layers there."""

from typing import Any

from pydantic import Field

from rft_cluster.model.families.family import CLIP_NORMAL, Family
from rft_cluster.model.numbers import TextNumbers, VisionNumbers, Width

# The same in Qwen2.5-VL:
PATCH = 14
BESIDE_LAYERS = ("embed_tokens.weight", "norm.weight", "visual.patch_embed.proj.weight", "visual.merger.mlp.0.weight")


class Qwen2Text(TextNumbers):
    """The same in Qwen2.5-VL."""

    @property
    def head(self) -> int:
        return self.hidden_size // self.num_attention_heads


def qwen2_rope(width: int) -> dict[str, Any]:
    """Blocks of frequencies for time, height and width; half of a head's 32."""
    return {"rope_parameters": {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 1e4}}


class Qwen2Vision(VisionNumbers):
    """`embed_dim` is the vision tower's own width, `hidden_size` the language model's."""

    embed_dim: Width = 1280
    hidden_size: Width = 3584
    mlp_ratio: float = Field(4, gt=0, le=64)
    patch_size: int = Field(PATCH, ge=PATCH, le=PATCH)

    @property
    def width(self) -> int:
        return self.embed_dim

    @property
    def inner(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)


QWEN2_VL = Family(
    model_type="qwen2_vl",
    name="Qwen2-VL",
    published=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-2B", "Qwen/Qwen2-VL-7B"),
    config_class="Qwen2VLConfig",
    model_class="Qwen2VLForConditionalGeneration",
    processor_class="Qwen2VLProcessor",
    video_processor_class="Qwen2VLVideoProcessor",
    patch=PATCH,
    normal=CLIP_NORMAL,
    text=Qwen2Text,
    vision=Qwen2Vision,
    beside_layers=BESIDE_LAYERS,
    tiny_text=qwen2_rope,
    tiny_vision=lambda width: {"embed_dim": 96, "hidden_size": width, "mlp_ratio": 2},
)
