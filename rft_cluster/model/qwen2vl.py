"""What is Qwen2-VL's alone: its tokens, its layers' names, its patches, and what a folder of one holds."""

import json
from pathlib import Path

from rft_cluster.common.errors import UserError

IMAGE_TOKEN = "<|image_pad|>"
# Sampled, any of these would make a completion that the model cannot read again ("Image features and image
# tokens do not match"): see `PromptEncoder.forbidden_token_ids`.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_TOKEN, "<|video_pad|>")
# Qwen2-VL ends a turn with the first and a document with the second; a completion stops at either.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# The linear layers of the language model (the vision tower's are named otherwise).
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


PATCH, MERGE = 14, 2
