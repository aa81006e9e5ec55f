"""Encode a question about an image into token ids and pixel values.

Generators and learners use the same `PromptEncoder`, so their pixel limits and token counts agree.
"""

import io
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.common.imports import light_imports
from rft_cluster.config import ModelSection
from rft_cluster.data.augment import augmented
from rft_cluster.data.images import open_image
from rft_cluster.messages import Augmentation, Images, Prompt
from rft_cluster.model.families.family import IMAGE_TOKEN, STOP_TOKENS, VISION_TOKENS
from rft_cluster.model.image_size import PromptLength, image_tokens, model_size
from rft_cluster.model.numbers import MERGE

with light_imports():
    from qwen_vl_utils import fetch_image
    from torch import Tensor
    from transformers import AutoConfig, AutoProcessor, GenerationConfig, PreTrainedConfig, ProcessorMixin

REASON = 300  # characters of a library's message
# A chat template's last words, if the model is to begin with its reasoning.
OPENING = re.compile(r"<think>\s*\Z")
# Keys of config.json. Not every family has all.
VISION_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")


@dataclass(frozen=True)
class EncodedImage:
    """`pixel_values` [patches, values of a patch] FP32; `image_grid_thw` [1, 3]: frames, rows, columns of patches."""

    pixel_values: Tensor
    image_grid_thw: Tensor


@dataclass(frozen=True)
class EncodedPrompt:
    """`token_ids` with the image's tokens expanded; `pixel_values` [patches, values of a patch] FP32; `image_grid_thw`
    [1, 3]."""

    token_ids: list[int]
    pixel_values: Tensor
    image_grid_thw: Tensor


class PromptEncoder:
    """Encodes prompts with the model's own processor and fixed pixel limits.

    `stop_token_ids`: a completion ends with one of them. `opening`: what the chat template writes of the completion, as
    those of Thinking variants do ("<think>\\n"); "" with the others.
    """

    def __init__(self, path: str, model: ModelSection) -> None:
        """`path`: the model's folder. `model`: how images are limited, and whether code of the folder may run.

        Raises UserError if the folder's processor, tokenizer or chat template is missing, damaged, or another
        model's."""
        self._processor, config = _load(path, model.trust_remote_code)
        images = self._processor.image_processor
        if not type(images).__name__.startswith("Qwen2VL"):  # all families have it; there are two implementations
            kind = type(images).__name__
            raise UserError(f"model.path: the image processor in {path} is a {kind}, which is not of a Qwen VL model")
        self._patch: int = images.patch_size
        self.side = self._patch * MERGE
        """Pixels of an image token's side."""
        low, high = model.pixels(self.side)
        self._limits = {"min_pixels": low, "max_pixels": high}
        self.tokenizer = self._processor.tokenizer
        absent = [token for token in (*VISION_TOKENS, *STOP_TOKENS) if token not in self.tokenizer.get_vocab()]
        if absent:
            raise UserError(
                f"model.path: the tokenizer in {path} lacks {', '.join(absent)}: it is not of a Qwen VL model"
            )
        self.image_token_id: int = config.image_token_id
        written = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if written != self.image_token_id:
            raise UserError(
                f"model.path: in {path}, image_token_id of config.json is {self.image_token_id}, but the tokenizer's "
                f"{IMAGE_TOKEN} is {written}: they are of different models; copy or download the folder anew"
            )
        # Texts and configurations each miss some: a configuration has but one stop token, and a model that was trained
        # further may have another one than its tokenizer's family.
        stop = [*self.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)), *_stop_ids(path, config)]
        self.stop_token_ids: list[int] = list(dict.fromkeys(stop))
        self.forbidden_token_ids = self._forbidden(config)
        self.opening = self._opening(path)

    def _opening(self, path: str) -> str:
        """Check the chat template, and return what it writes of the completion."""
        try:
            text = self.chat("What is it?")
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(f"model.path: the chat template in {path} cannot be used: {error}") from error
        if text.count(IMAGE_TOKEN) != 1 or "What is it?" not in text:
            raise UserError(f"model.path: the chat template in {path} does not place one image and the question")
        opening = OPENING.search(text)
        return opening[0] if opening else ""

    def _forbidden(self, config: PreTrainedConfig) -> list[int]:
        """Sorted ids of the tokens that generators never sample and learners exclude from the softmax.

        These are vision tokens and all other special tokens, except those that end a completion. They do not show in
        the text, so no reward could see them.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special} | set(self.tokenizer.all_special_ids)
        vision = {*self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), *_vision_ids(config)}
        return sorted((special | vision) - set(self.stop_token_ids))

    def chat(self, text: str) -> str:
        """Format an image followed by `text` with the chat template, up to the start of the answer."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self._processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)

    def image(self, data: bytes, how: Augmentation | None = None) -> Image.Image:
        """The encoded image as RGB, changed as `how` says, and resized into the pixel limits with both sides multiples
        of an image token's."""
        shown = augmented(open_image(data), how)
        return fetch_image({"image": shown, **self._limits}, image_patch_size=self._patch)

    def image_limits(self) -> dict[str, Any]:
        """The processor's pixel limits, set so that it does not resize the images that `image` returns: their sides are
        rounded down where they would have too many pixels, so between close limits they have fewer than `min_pixels`.
        """
        return {"size": {"shortest_edge": self.side**2, "longest_edge": self._limits["max_pixels"]}}

    def encode(self, text: str, image: bytes) -> EncodedPrompt:
        """A prompt of this text and this encoded image: what the model's processor makes of both."""
        return self.joined(self.encode_text(text), self.encode_image(image))

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a prompt of this text, with one token in the image's place."""
        return self.tokenizer(self.chat(text))["input_ids"]

    def encode_image(self, image: bytes, how: Augmentation | None = None) -> EncodedImage:
        shown = [self.image(image, how)]
        inputs = self._processor.image_processor(shown, return_tensors="pt", **self.image_limits())
        return EncodedImage(inputs["pixel_values"], inputs["image_grid_thw"])

    def joined(self, text: list[int], image: EncodedImage) -> EncodedPrompt:
        """The prompt of an encoded text and an encoded image."""
        tokens = int(image.image_grid_thw.prod()) // MERGE**2
        return EncodedPrompt(self._expanded(text, tokens), image.pixel_values, image.image_grid_thw)

    def prompt_tokens(self, prompt: Prompt, images: Images) -> list[int]:
        """The token ids of a prompt, with the image's tokens expanded. The image is not decoded, its size is read."""
        return self._expanded(self.encode_text(prompt.text), self._image_tokens(prompt, images))

    def _expanded(self, text: list[int], tokens: int) -> list[int]:
        place = text.index(self.image_token_id)
        return [*text[:place], *[self.image_token_id] * tokens, *text[place + 1 :]]

    def check_lengths(self, prompts: Sequence[Prompt], images: Images, max_prompt_tokens: int) -> list[PromptLength]:
        """Each prompt's number of tokens, by arithmetic: images are not decoded, their sizes are read.

        Raises:
            UserError: a prompt is longer than `max_prompt_tokens`. It is never cut: an image that lost tokens
                no longer matches its features. Or an image is too long and narrow for the pixel limits.
        """
        text_tokens = {text: self._text_tokens(text) for text in {prompt.text for prompt in prompts}}
        lengths = []
        for prompt in prompts:
            length = PromptLength(self._image_tokens(prompt, images), text_tokens[prompt.text])
            if length.tokens > max_prompt_tokens:
                raise UserError(
                    f"the prompt of {prompt.example_id} has {length.tokens} tokens ({length.image} of the image, "
                    f"{length.text} of the text), more than model.max_prompt_tokens = {max_prompt_tokens}: raise that, "
                    f"lower model.max_image_tokens, or shorten the template"
                )
            lengths.append(length)
        return lengths

    def _text_tokens(self, text: str) -> int:
        """Tokens of a prompt without those of its image."""
        return len(self.encode_text(text)) - 1  # the image's place is one

    def _image_tokens(self, prompt: Prompt, images: Images) -> int:
        with Image.open(io.BytesIO(images[prompt.example.image.sha256])) as header:
            width, height = header.size
        size = model_size(width, height, **self._limits, side=self.side)
        if 0 in size:
            raise UserError(
                f"{prompt.example_id}: {width}x{height} is too long and narrow for {self._limits['max_pixels']} "
                f"pixels: raise model.max_image_tokens, or leave the image out"
            )
        return image_tokens(*size, self.side)

    def save(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)


def _vision_ids(config: PreTrainedConfig) -> set[int]:
    told = config.to_dict()
    return {told[key] for key in VISION_KEYS if told.get(key) is not None}


def _stop_ids(path: str, config: PreTrainedConfig) -> list[int]:
    """The ids that end a completion by config.json, and by generation_config.json if there is one."""
    told = [config.text_config.eos_token_id]
    with suppress(OSError):  # a model needs no such file
        told.append(GenerationConfig.from_pretrained(path).eos_token_id)
    return [one for ids in told if ids is not None for one in (ids if isinstance(ids, list) else [ids])]


def _load(path: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The processor and the configuration."""
    try:
        config = AutoConfig.from_pretrained(path)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception
        reason = " ".join(str(error).split())[:REASON]
        raise UserError(
            f"model.path: the processor or tokenizer of {path} cannot be read ({type(error).__name__}: {reason}); "
            f"copy or download the folder anew"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise UserError(
            f"model.path: {path} holds no image processor (preprocessor_config.json or processor_config.json); copy or "
            f"download the folder anew"
        )
    return processor, config
