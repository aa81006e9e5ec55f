"""The vision tower of a model, frozen: one vector an image, for baselines that need no language model."""

import numpy as np
import torch

from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config
from rft_cluster.model.computing import set_up_torch, within_memory
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import load_reference, move_to

WHO = "the vision tower"  # in messages


class VisionTower:
    """`cluster/` makes it a Ray actor. The whole model is loaded into the host's memory, its tower moved to the device.

    Images get the size that they have in prompts, so the features are those that the policy started from.
    """

    def __init__(self, path: str, config: Config, threads: int) -> None:
        """Raises UserError if the model cannot be loaded here, or the GPU's memory is taken by others."""
        chosen = hardware(config.cluster.device, config.cluster.dtype)
        set_up_torch(threads)
        model = config.model
        self._device = torch.device(chosen.device)
        self._encoder = PromptEncoder(path, model)
        self._model = load_reference(path, model, chosen.attention, self._encoder.forbidden_token_ids, temperature=1.0)
        with within_memory(WHO):
            move_to(self._model.model.model.visual, chosen.device, chosen.dtype)

    @torch.inference_mode()
    def features(self, image: bytes) -> np.ndarray:
        """The mean of an encoded image's tokens as the language model gets them, [hidden size] FP32.

        One image a call: its features do not depend on others, and memory is that of one image.

        Raises:
            UserError: the GPU's memory is taken by others.
        """
        encoded = self._encoder.encode_image(image)
        pixels, grid = encoded.pixel_values.to(self._device), encoded.image_grid_thw.to(self._device)
        with within_memory(WHO):
            (tokens,) = self._model.image_features(pixels, grid).pooler_output  # [image tokens, hidden size]
        return tokens.float().mean(0).cpu().numpy()
