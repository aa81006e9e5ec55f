"""The plain way to a policy's log-probabilities: every completion with its own copy of the prompt and the image.

    [ prompt | completion 1 | padding ]
    [ prompt | completion 2           ]        one row each, padded on the right, any attention that transformers has

It is what the learner's shared-prefix forward is measured against (`learner_forward.py`), and tested against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2VLForConditionalGeneration

from rft_cluster.learner.prompt_cache import Encoder
from rft_cluster.messages import TrainingSample
from rft_cluster.model.shapes import LOGPROB_CHUNK


def plain_inputs(samples: Sequence[TrainingSample], encoder: Encoder, image_token_id: int) -> dict[str, Tensor]:
    """The model's inputs for B completions: [B, T] token ids, mask and types, and B images."""
    prompts = [encoder.encode(sample.prompt) for sample in samples]
    rows = [prompt.token_ids + sample.token_ids for prompt, sample in zip(prompts, samples, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "mm_token_type_ids": (input_ids == image_token_id).long() * mask,
        "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]),
    }


def plain_logprobs(
    model: Qwen2VLForConditionalGeneration,
    samples: Sequence[TrainingSample],
    encoder: Encoder,
    forbidden: list[int],
    temperature: float,
) -> list[Tensor]:
    """Log-probabilities of each completion's tokens [R] FP32, in the order of `samples`."""
    inputs = plain_inputs(samples, encoder, model.config.image_token_id)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    starts = [len(sample.prompt_token_ids) - 1 for sample in samples]
    states = torch.cat(
        [hidden[i, start : start + len(samples[i].token_ids)] for i, start in enumerate(starts)]
    )  # [C, hidden size]
    tokens = torch.cat([torch.tensor(sample.token_ids) for sample in samples]).to(model.device)

    entropies: list[Tensor] = []

    def token_logprobs(states: Tensor, token_ids: Tensor) -> Tensor:
        logits = model.lm_head(states).float().div_(temperature)
        logits[:, forbidden] = float("-inf")
        logits = logits.log_softmax(-1)
        with torch.no_grad():  # a learner reports the entropy, on either side
            terms = logits.exp().mul_(logits)
            terms[:, forbidden] = 0.0
            entropies.append(-terms.sum(-1))
        return logits.gather(-1, token_ids[:, None]).squeeze(-1)

    pieces = [
        checkpoint(token_logprobs, *piece, use_reentrant=False)
        for piece in zip(states.split(LOGPROB_CHUNK), tokens.split(LOGPROB_CHUNK), strict=True)
    ]
    return list(torch.cat(pieces).split([len(sample.token_ids) for sample in samples]))
