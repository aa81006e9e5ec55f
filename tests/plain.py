"""transformers' own forward of one completion by itself, with which packed rows and engines are compared."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rft_cluster.model.encoder import EncodedPrompt


def plain_logits(model: PreTrainedModel, prompt: EncodedPrompt, written: list[int], image_token_id: int) -> Tensor:
    """The logits [P + R, vocabulary] of a prompt and the R tokens that follow it, of all tokens of the vocabulary."""
    ids = torch.tensor([prompt.token_ids + written])
    return model(
        input_ids=ids,
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == image_token_id).long(),
    ).logits[0]
