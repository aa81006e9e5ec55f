"""Qwen2-VL: every vision layer attends to the whole image; LayerNorm and an MLP of two layers there."""

from pydantic import Field

from rft_cluster.model.families.family import Family
from rft_cluster.model.numbers import VisionNumbers, Width

PATCH = 14


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
    vision=Qwen2Vision,
    beside_layers=(
        "embed_tokens.weight",
        "norm.weight",
        "visual.patch_embed.proj.weight",
        "visual.merger.mlp.0.weight",
    ),
    tiny_vision=lambda width: {"embed_dim": 96, "hidden_size": width, "mlp_ratio": 2},
)
