"""Every fact about Qwen2-VL that the project relies on: its tokens, its images, its shape.

Generators and learners encode a prompt with the same `PromptEncoder`, so pixel limits and token counts cannot
drift apart. `PolicyModel` is the learner's model: it reads each prompt and image once for all its completions and
returns log-probabilities of completion tokens, never a [tokens x vocabulary] tensor for the whole sequence.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from qwen_vl_utils import fetch_image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

from rft_cluster.common.errors import UserError
from rft_cluster.config import ModelSection
from rft_cluster.data.images import open_image
from rft_cluster.messages import Prompt
from rft_cluster.model.shared_prefix import PackLayout

IMAGE_TOKEN = "<|image_pad|>"
# Sampled, any of these would make a completion that the model cannot read again ("Image features and image
# tokens do not match"). Generators never sample them and learners renormalise without them.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_TOKEN, "<|video_pad|>")
# Qwen2-VL ends a turn with the first and a document with the second; a completion stops at either.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# The linear layers of the language model (the vision tower's are named otherwise).
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Log-probabilities are computed for so many tokens at once: bounds the FP32 [tokens x vocabulary] tensor.
LOGPROB_CHUNK = 512


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
        self.vision_token_ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
        self.stop_token_ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

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


def check_model_folder(path: str, longest_sequence: int) -> None:
    """Refuse a local folder that is not a Qwen2-VL, or whose window is too short. Hub names pass unread.

    Raises:
        UserError: says what the folder is instead.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "~")):
            raise UserError(f"model.path: there is no folder {path}")
        return
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"model.path: {path} holds no config.json, so it is not a model folder")
    try:
        config = json.loads(config_file.read_bytes())
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"model.path: {config_file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"model.path: {config_file} holds a {type(config).__name__}, not an object")
    if config.get("model_type") != "qwen2_vl":
        raise UserError(f"model.path: {path} is a {config.get('model_type')!r}, but only 'qwen2_vl' is supported")
    window = (config.get("text_config") or config).get("max_position_embeddings")
    if window is not None and longest_sequence > window:
        raise UserError(
            f"model.max_prompt_tokens + sampling.max_tokens = {longest_sequence} is more than the window of "
            f"{path}, {window} tokens: lower one of them"
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.path: {path} holds no .safetensors file (pickled weights are not loaded)")


class MatrixPatchEmbed(PatchEmbed):
    """A convolution whose stride is its kernel is one matrix product. As a convolution, forward and backward took 8
    times as long on a CPU in FP32, and 150 times in BF16: a sixth of a learner's time."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[patches, 1176] -> [patches, width]."""
        weight = self.proj.weight
        return F.linear(hidden_states.to(weight.dtype), weight.flatten(1))


def multiply_patches(model: Qwen2VLForConditionalGeneration) -> None:
    """Have the vision tower embed its patches by a matrix product."""
    model.model.visual.patch_embed.__class__ = MatrixPatchEmbed


class PolicyModel(nn.Module):
    """Qwen2-VL whose forward gives the log-probabilities of given completion tokens.

    It is the FSDP root: log-probabilities are computed inside its forward, where the tied embedding and lm_head
    are gathered. Calling `lm_head` from outside would go around FSDP's hooks.
    """

    def __init__(self, model: Qwen2VLForConditionalGeneration, forbidden: list[int], temperature: float) -> None:
        super().__init__()
        multiply_patches(model)
        self.model = model
        self.temperature = temperature
        self.forbidden = forbidden

    def prompt_positions(self, prompt: EncodedPrompt) -> Tensor:
        """The prompt's M-RoPE positions [3, P] int64 (time, height, width), by the model's own rule."""
        ids = torch.tensor([prompt.token_ids])
        is_image = (ids == self.model.config.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(ids, is_image, prompt.image_grid_thw)
        return positions[:, 0]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        layout: PackLayout,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        predictor_index: Tensor,
        completion_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of C completion tokens under the sampled distribution, and its entropy.

        Args:
            input_ids: [1, T] int64: prompts, then completions, as `layout` says.
            position_ids: [3, 1, T] int64.
            layout: what of the row attends to what.
            pixel_values: [patches of the prompts' images, 1176].
            image_grid_thw: [prompts, 3] int64.
            predictor_index: [C] int64, the position in T whose output predicts each completion token.
            completion_ids: [C] int64.

        Returns:
            log-probabilities [C] FP32 in nats, and entropy [C] FP32 without gradient.
        """
        # Apart from the language model's call, so that the vision tower never sees the layout.
        images = self.model.model.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        hidden = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            mm_encoder_outputs={"image": images},
            use_cache=False,
            layout=layout,
        ).last_hidden_state
        selected = hidden[0].index_select(0, predictor_index)  # [C, hidden size]
        pieces = [
            checkpoint(self._token_logprobs, states, ids, use_reentrant=False)
            for states, ids in zip(selected.split(LOGPROB_CHUNK), completion_ids.split(LOGPROB_CHUNK), strict=True)
        ]
        logprobs, entropy = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)

    def _token_logprobs(self, states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[N, hidden size], [N] -> log-probabilities [N] and entropy [N], FP32."""
        logits = self.model.lm_head(states).float().div_(self.temperature)
        # The generator samples from the same restricted, tempered distribution.
        logits[:, self.forbidden] = float("-inf")
        logits = logits.log_softmax(-1)  # under the old name: two tensors of this size are the peak
        with torch.no_grad():
            terms = logits.exp().mul_(logits)
            terms[:, self.forbidden] = 0.0  # not 0 * -inf
        return logits.gather(-1, token_ids[:, None]).squeeze(-1), -terms.sum(-1)


def load_policy(
    path: str, model: ModelSection, attention: dict[str, str], forbidden: list[int], temperature: float
) -> PolicyModel:
    """The trainable model of a folder or hub name, on the CPU: FP32 masters, or FP32 adapters on a BF16 base."""
    dtype = torch.bfloat16 if model.lora else torch.float32
    policy = PolicyModel(_load(path, dtype, attention, model.trust_remote_code), forbidden, temperature)
    if model.freeze_vision:
        policy.model.model.visual.requires_grad_(False)
    if model.lora:
        policy.requires_grad_(False)
        settings = LoraConfig(r=model.lora.rank, lora_alpha=model.lora.alpha, target_modules=LORA_TARGETS)
        inject_adapter_in_model(settings, policy.model)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # Qwen2-VL has no dropout; transformers checkpoints activations in training mode alone.
    return policy.train()


def load_reference(
    path: str, model: ModelSection, attention: dict[str, str], forbidden: list[int], temperature: float
) -> PolicyModel:
    """The starting model in BF16, not trained. With LoRA none is needed: see `base_model`."""
    policy = PolicyModel(_load(path, torch.bfloat16, attention, model.trust_remote_code), forbidden, temperature)
    return policy.requires_grad_(False).eval()


def _load(
    path: str, dtype: torch.dtype, attention: dict[str, str], trust_remote_code: bool
) -> Qwen2VLForConditionalGeneration:
    """Only safetensors are read.

    Raises:
        UserError: its attention sees only a window of the sequence, which no published Qwen2-VL's does.
    """
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    if "sliding_attention" in model.config.text_config.layer_types:
        raise UserError(f"model.path: {path} has use_sliding_window set, which this program's attention does not do")
    model.config.use_cache = False
    return model


@contextmanager
def base_model(policy: PolicyModel) -> Iterator[PolicyModel]:
    """The policy with its adapters switched off: with LoRA the starting model needs no memory of its own."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    scaling = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = dict.fromkeys(layer.scaling, 0.0)
    yield policy
    for layer, scales in zip(layers, scaling, strict=True):
        layer.scaling = scales


def shard_units(policy: PolicyModel) -> list[nn.Module]:
    """The layers that FSDP gathers one at a time; the rest (tied embedding, lm_head, merger) stays in the root."""
    return [*policy.model.model.visual.blocks, *policy.model.model.language_model.layers]
