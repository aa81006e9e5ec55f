"""What differs between families of models, and what is equal in all of them.

Classes of transformers are named, not imported: a folder is checked before torch is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rft_cluster.model.numbers import MERGE, TextNumbers, VisionNumbers

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGE_TOKEN = "<|image_pad|>"
# Vision tokens must not be sampled: the model could not read such a completion ("Image features and image tokens do
# not match"). See `PromptEncoder.forbidden_token_ids`.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_TOKEN, "<|video_pad|>")
# A model ends a turn with the first and a document with the second; a completion stops at either.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# The linear layers of a text layer that get adapters with LoRA. A vision tower may have layers of the same names, so
# they are found by their whole path.
TEXT_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_TARGETS = rf"model\.language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:{'|'.join(TEXT_LINEAR)})"


def no_windows(config: Any, grid_thw: "Tensor") -> dict[str, "Tensor"]:
    """For vision towers whose layers all attend to the whole image."""
    return {}


def layers_alone(model: Any) -> list["nn.Module"]:
    """The vision blocks and the text layers."""
    return [*model.model.visual.blocks, *model.model.language_model.layers]


# CLIP's
CLIP_NORMAL = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Family:
    """One family.

    `model_type`: in config.json. `name`: in messages. `published`: names on the hub.
    `config_class`, `model_class`, `processor_class`, `video_processor_class`: names in transformers.
    `patch`: pixels of a patch's side.
    `normal`: mean and deviation of the colours, on a scale from 0 to 1, in the published image processors.
    `text`, `vision`: the numbers of config.json's `text_config` and `vision_config`.
    `beside_layers`: tensors outside the layers, by the end of their names: prefixes differ between versions of
        transformers.
    `tiny_text`, `tiny_vision`: width of the language model -> `text_config` and `vision_config` of the demo's model, as
        far as they differ from those of the other families.
    `windows`: (vision config, image_grid_thw [images, 3]) -> further arguments of the vision tower that are the same in
        all of its layers. Those that each layer reads on the host are on the device of `image_grid_thw`.
    `shard_units`: model -> the modules that FSDP gathers one at a time.
    """

    model_type: str
    name: str
    published: tuple[str, ...]
    config_class: str
    model_class: str
    processor_class: str
    video_processor_class: str
    patch: int
    normal: tuple[tuple[float, ...], tuple[float, ...]]
    text: type[TextNumbers]
    vision: type[VisionNumbers]
    beside_layers: tuple[str, ...]
    tiny_text: Callable[[int], dict[str, Any]]
    tiny_vision: Callable[[int], dict[str, Any]]
    windows: Callable[[Any, "Tensor"], dict[str, "Tensor"]] = no_windows
    shard_units: Callable[[Any], list["nn.Module"]] = layers_alone

    @property
    def side(self) -> int:
        """Pixels of an image token's side."""
        return self.patch * MERGE

    @property
    def numbers(self) -> tuple[type[TextNumbers], type[VisionNumbers]]:
        return self.text, self.vision
