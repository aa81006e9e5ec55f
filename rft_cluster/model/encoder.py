"""From a question about an image to token ids and pixel values.

Generators and learners encode a prompt with the same `PromptEncoder`, so pixel limits and token counts cannot
drift apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from qwen_vl_utils import fetch_image
from torch import Tensor
from transformers import AutoProcessor

from rft_cluster.common.errors import UserError
from rft_cluster.data.images import open_image
from rft_cluster.messages import Prompt
from rft_cluster.model.qwen2vl import IMAGE_TOKEN, STOP_TOKENS, VISION_TOKENS


@dataclass(frozen=True)
class EncodedPrompt:
    """`token_ids` with the image's tokens expanded; `pixel_values` [patches, 1176] FP32; `image_grid_thw` [1, 3]."""

    token_ids: list[int]
    pixel_values: Tensor
    image_grid_thw: Tensor


class PromptEncoder:
    """Turns prompts into what the model reads, with the model's own processor and fixed pixel limits."""

    def __init__(self, path: str, min_pixels: int, max_pixels: int, trust_remote_code: bool = False) -> None:
        self._processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        self._limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.tokenizer = self._processor.tokenizer
        self.stop_token_ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
        self.forbidden_token_ids = self._forbidden()
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def _forbidden(self) -> list[int]:
        """What generators never sample and learners renormalise without, sorted: vision tokens, and every other special
        token that does not end a completion. A text shows none of those, so no reward could see them."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special} | set(self.tokenizer.all_special_ids)
        vision = self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
        return sorted((special | set(vision)) - set(self.stop_token_ids))

    def chat(self, text: str) -> str:
        """The model's chat format of an image followed by `text`, up to where the answer begins."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self._processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)

    def image(self, data: bytes) -> Image.Image:
        """The encoded image as RGB, resized into the pixel limits with both sides multiples of 28."""
        return fetch_image({"image": open_image(data), **self._limits})

    def image_limits(self) -> dict[str, Any]:
        """The processor's own pixel limits, set so that it leaves an image from `image` as it is."""
        return {"size": {"shortest_edge": self._limits["min_pixels"], "longest_edge": self._limits["max_pixels"]}}

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        inputs = self._processor(
            text=[self.chat(prompt.text)],
            images=[self.image(prompt.image)],
            return_tensors="pt",
            images_kwargs=self.image_limits(),
        )
        return EncodedPrompt(inputs["input_ids"][0].tolist(), inputs["pixel_values"], inputs["image_grid_thw"])

    def check_lengths(self, prompts: Sequence[Prompt], max_prompt_tokens: int) -> int:
        """The longest prompt's number of tokens.

        Raises:
            UserError: a prompt is longer than `max_prompt_tokens`. It is never cut: an image that lost tokens
                no longer matches its features.
        """
        longest = 0
        for prompt in prompts:
            token_ids = self.encode(prompt).token_ids
            longest = max(longest, len(token_ids))
            if len(token_ids) > max_prompt_tokens:
                image = token_ids.count(self.image_token_id)
                raise UserError(
                    f"the prompt of {prompt.example_id} has {len(token_ids)} tokens ({image} of the image, "
                    f"{len(token_ids) - image} of the text), more than model.max_prompt_tokens = "
                    f"{max_prompt_tokens}: raise that, lower model.max_pixels, or shorten the template"
                )
        return longest

    def save(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)
