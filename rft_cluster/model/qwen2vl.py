"""Constants of Qwen2-VL: tokens, names of layers, patch sizes."""

IMAGE_TOKEN = "<|image_pad|>"
# Vision tokens must not be sampled: the model could not read such a completion ("Image features and image tokens do
# not match"). See `PromptEncoder.forbidden_token_ids`.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_TOKEN, "<|video_pad|>")
# Qwen2-VL ends a turn with the first and a document with the second; a completion stops at either.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# The linear layers of the language model. The vision tower's have other names.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


PATCH, MERGE = 14, 2
