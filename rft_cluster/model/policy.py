"""The learner's model. It encodes each prompt and image once for all its completions, and returns log-probabilities of
completion tokens without a [tokens x vocabulary] tensor for the whole sequence.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from rft_cluster.common.errors import UserError
from rft_cluster.common.imports import light_imports
from rft_cluster.config import ModelSection
from rft_cluster.model.encoder import EncodedPrompt
from rft_cluster.model.families.family import LORA_TARGETS
from rft_cluster.model.families.known import family_of
from rft_cluster.model.logprobs import Sampled, token_logprobs
from rft_cluster.model.patch_embed import multiply_patches
from rft_cluster.model.shared_prefix import PackLayout

with light_imports():
    import transformers
    from transformers import AutoConfig, PreTrainedModel
    from transformers.utils.generic import is_flash_attention_requested
    from transformers.vision_utils import get_vision_cu_seqlens


class PolicyModel(nn.Module):
    """A model whose forward returns the log-probabilities of given completion tokens.

    This module is the FSDP root, and computes log-probabilities inside its forward, where the tied embedding and
    lm_head are gathered. A call of `lm_head` from outside would bypass FSDP's hooks.
    """

    def __init__(self, model: PreTrainedModel, forbidden: list[int], temperature: float) -> None:
        super().__init__()
        multiply_patches(model)
        self.model: Any = model
        self._family = family_of(model.config.model_type, "the model")
        self._sampled = Sampled(temperature, forbidden)

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
        exact: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of C completion tokens under the sampled distribution, and its entropy.

        Args:
            input_ids: [1, T] int64: prompts, then completions, as `layout` says.
            position_ids: [3, 1, T] int64.
            layout: which positions of the row attend to which.
            pixel_values: [patches of the prompts' images, values of a patch].
            image_grid_thw: [prompts, 3] int64.
            predictor_index: [C] int64, the position in T whose output predicts each completion token.
            completion_ids: [C] int64.
            exact: without a gradient alone. Logits are not rounded to BF16, as they are in generators and in training.

        Returns:
            log-probabilities [C] FP32 in nats, and entropy [C] FP32 without gradient.
        """
        # The vision tower is called separately, because it must not get the layout.
        images = self.image_features(pixel_values, image_grid_thw)
        hidden = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            mm_encoder_outputs={"image": images},
            use_cache=False,
            layout=layout,
        ).last_hidden_state
        # All completions of a prompt read its last position, so the backward adds up gradients. An embedding lookup in
        # FP32 adds them in FP32 and in a fixed order on every device; indexing on GPUs adds BF16 in any order.
        selected = F.embedding(predictor_index, hidden[0].float()).to(hidden.dtype)  # [C, hidden size]
        selected = selected.float() if exact else selected
        return token_logprobs(selected, self.model.lm_head.weight, completion_ids, self._sampled)

    def image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Any:
        """transformers' output of the vision tower; `pooler_output` has [image tokens, hidden size] for each image.

        Args: as in `forward`.
        """
        return self.model.model.get_image_features(
            pixel_values, image_grid_thw, return_dict=True, **self._attention_starts(image_grid_thw)
        )

    def _attention_starts(self, image_grid_thw: Tensor) -> dict[str, Tensor]:
        """Arguments of the vision tower: where each image's patches begin, and the last ones end ([images + 1] int32),
        and the same of windows, if it has any.

        With SDPA each layer reads the lengths three times on the host. From the device it would wait for the GPU each
        time, so they are copied once. flash-attention needs them on the device.
        """
        config = self.model.config.vision_config
        grid = image_grid_thw if is_flash_attention_requested(config) else image_grid_thw.cpu()
        return {"cu_seqlens": get_vision_cu_seqlens(grid), **self._family.windows(config, grid)}

    def shard_units(self) -> list[nn.Module]:
        """The layers that FSDP gathers one at a time. The rest (tied embedding, lm_head, merger) is in the root's."""
        return self._family.shard_units(self.model)


def load_policy(
    path: str, model: ModelSection, attention: dict[str, str], forbidden: list[int], temperature: float
) -> PolicyModel:
    """Load the trainable model on the CPU: FP32 master weights, or FP32 adapters on a BF16 base."""
    dtype = torch.bfloat16 if model.lora else torch.float32
    policy = PolicyModel(_load(path, dtype, attention, model.trust_remote_code), forbidden, temperature)
    if model.freeze_vision:
        policy.model.model.visual.requires_grad_(False)
    if model.lora:
        with light_imports():  # takes a second, and only LoRA needs it
            from peft import LoraConfig, inject_adapter_in_model

        policy.requires_grad_(False)
        settings = LoraConfig(r=model.lora.rank, lora_alpha=model.lora.alpha, target_modules=LORA_TARGETS)
        inject_adapter_in_model(settings, policy.model)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # transformers checkpoints activations only in training mode. No family has dropout.
    return policy.train()


def load_reference(
    path: str, model: ModelSection, attention: dict[str, str], forbidden: list[int], temperature: float
) -> PolicyModel:
    """Load the frozen starting model in BF16. LoRA does not need it: see `base_model`."""
    policy = PolicyModel(_load(path, torch.bfloat16, attention, model.trust_remote_code), forbidden, temperature)
    return policy.requires_grad_(False).eval()


def move_to(module: nn.Module, device: str, dtype: str) -> None:
    """Move a module to a device, to compute there in `dtype`: its parameters get that type, as under FSDP.

    `Module.to` would also round buffers. The rotary frequencies are among them, and with BF16's an angle is wrong by
    0.1 radian at position 100, and by 1.2 at position 1,000 (head size 128, base 10^6).
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    module.to(device)


def _load(path: str, dtype: torch.dtype, attention: dict[str, str], trust_remote_code: bool) -> PreTrainedModel:
    """Load a model from safetensors only, as the class of its family.

    Raises:
        UserError: the files cannot be read or fetched on this node, although the driver's checks passed elsewhere; or
            the model has sliding-window attention, which no published model uses.
    """
    try:
        family = family_of(AutoConfig.from_pretrained(path).model_type, path)
        model = getattr(transformers, family.model_class).from_pretrained(
            path, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.path: {path} cannot be loaded on {socket.gethostname()}: {str(error).strip().splitlines()[0]}. It "
            f"must be the same on every node: a folder on a shared disk, or a hub name that each node can fetch"
        ) from error
    if "sliding_attention" in model.config.text_config.to_dict().get("layer_types", []):  # Qwen3-VL's has none
        raise UserError(f"model.path: {path} has use_sliding_window set, which is not supported")
    model.config.use_cache = False
    return model


@contextmanager
def base_model(policy: PolicyModel) -> Iterator[PolicyModel]:
    """The policy with its adapters switched off: the starting model of LoRA, without extra memory."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    scaling = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = dict.fromkeys(layer.scaling, 0.0)
    try:
        yield policy
    finally:
        for layer, scales in zip(layers, scaling, strict=True):
            layer.scaling = scales
