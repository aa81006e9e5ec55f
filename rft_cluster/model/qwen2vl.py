"""What is Qwen2-VL's alone: its tokens, its layers' names, its patches."""

IMAGE_TOKEN = "<|image_pad|>"
# Sampled, any of these would make a completion that the model cannot read again ("Image features and image
# tokens do not match"): see `PromptEncoder.forbidden_token_ids`.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_TOKEN, "<|video_pad|>")
# Qwen2-VL ends a turn with the first and a document with the second; a completion stops at either.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# The linear layers of the language model (the vision tower's are named otherwise).
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


PATCH, MERGE = 14, 2
