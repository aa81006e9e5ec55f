"""Qwen2.5-VL: most vision layers attend in windows of 112 x 112 pixels; RMSNorm and a gated MLP with biases there."""

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rft_cluster.model.families.family import CLIP_NORMAL, Family
from rft_cluster.model.families.qwen2_vl import BESIDE_LAYERS, PATCH, Qwen2Text, qwen2_rope
from rft_cluster.model.numbers import MERGE, OwnWidthNumbers, Width

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 112  # pixels


class Qwen25Vision(OwnWidthNumbers):
    gated: ClassVar[bool] = True
    inner_kept: ClassVar[int] = 4
    hidden_size: Width = 3584
    intermediate_size: Width = 3420
    patch_size: int = Field(PATCH, ge=PATCH, le=PATCH)
    window_size: int = Field(WINDOW, ge=PATCH * MERGE, le=65_536)
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def window_patches(self) -> int:
        return (self.window_size // PATCH) ** 2

    @property
    def windowed_layers(self) -> int:
        return self.depth - len(set(self.fullatt_block_indexes) & set(range(self.depth)))


def windows(config: Any, grid_thw: "Tensor") -> dict[str, "Tensor"]:
    """The order of image tokens window by window [image tokens] int64, and where each window's patches begin, and the
    last ones end [windows + 1] int32. A window at the right or lower edge is smaller."""
    from transformers.vision_utils import get_vision_window_index

    index, starts = get_vision_window_index(grid_thw, config.spatial_merge_size, config.window_size, config.patch_size)
    return {"window_index": index, "cu_window_seqlens": starts}


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    published=("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    config_class="Qwen2_5_VLConfig",
    model_class="Qwen2_5_VLForConditionalGeneration",
    processor_class="Qwen2_5_VLProcessor",
    video_processor_class="Qwen2VLVideoProcessor",
    patch=PATCH,
    normal=CLIP_NORMAL,
    text=Qwen2Text,
    vision=Qwen25Vision,
    beside_layers=BESIDE_LAYERS,
    # The second of three layers attends to the whole image.
    tiny_text=qwen2_rope,
    tiny_vision=lambda width: {
        **{"hidden_size": 96, "intermediate_size": 128, "out_hidden_size": width},
        **{"window_size": WINDOW, "fullatt_block_indexes": [1]},
    },
    windows=windows,
)
