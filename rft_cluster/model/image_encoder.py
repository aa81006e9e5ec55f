"""Any image encoder that transformers loads (SigLIP2, DINOv3, ...), frozen: one vector an image, for baselines."""

from typing import Any

import numpy as np
import torch

from rft_cluster.common.errors import UserError
from rft_cluster.common.hardware import hardware
from rft_cluster.common.imports import light_imports
from rft_cluster.config import Config
from rft_cluster.data.images import open_image
from rft_cluster.model.computing import set_up_torch, within_memory

with light_imports():
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModel

WHO = "the image encoder"  # in messages


class ImageEncoder:
    """`cluster/` makes it a Ray actor. An image gets the size that the encoder's own processor gives it."""

    def __init__(self, path: str, config: Config, threads: int) -> None:
        """Load the folder `path`, from safetensors and without code of the folder.

        Raises:
            UserError: transformers cannot load it so, it is not an encoder of images, or the GPU's memory is taken by
                others.
        """
        chosen = hardware(config.cluster.device, config.cluster.dtype)
        set_up_torch(threads)
        self._device, self._dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
        local = {"trust_remote_code": False, "local_files_only": True}
        try:
            self._processor = AutoImageProcessor.from_pretrained(path, **local)
            model, loaded = AutoModel.from_pretrained(
                path, use_safetensors=True, dtype=self._dtype, output_loading_info=True, **local
            )
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"evaluation.encoder: {path} cannot be loaded as an image encoder: {reason}") from error
        if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
            raise UserError(f"evaluation.encoder: {path} holds a {type(model).__name__}, which does not encode images")
        # transformers makes up at random what a folder lacks. Some encoders are published without their class's head.
        absent = sorted(name for name in loaded["missing_keys"] if "pooler" not in name)
        if absent:
            raise UserError(
                f"evaluation.encoder: {path} lacks {len(absent)} weights of a {type(model).__name__}, e.g. {absent[0]}"
            )
        self._has_head = not loaded["missing_keys"]
        with within_memory(WHO):
            self._model = model.requires_grad_(False).eval().to(self._device)

    @torch.inference_mode()
    def features(self, image: bytes) -> np.ndarray:
        """The model's own vector of an encoded image, [values] FP32: what its head pools, or, if the folder has no
        weights of such a head, the mean over its tokens.

        Raises:
            UserError: the GPU's memory is taken by others.
        """
        inputs = self._processor(images=open_image(image), return_tensors="pt").to(self._device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        with within_memory(WHO):
            found = self._encoded(inputs)
        is_pooled = self._has_head and found.pooler_output is not None
        vector = found.pooler_output[0] if is_pooled else found.last_hidden_state[0].mean(0)
        return vector.float().flatten().cpu().numpy()

    def _encoded(self, inputs: Any) -> Any:
        """`pooler_output` [1, values] or None, `last_hidden_state` [1, tokens, values]."""
        if hasattr(self._model, "get_image_features"):  # a model of images and texts
            return self._model.get_image_features(**inputs)
        return self._model(**inputs)
