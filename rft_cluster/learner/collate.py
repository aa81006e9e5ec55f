"""Turn the samples of a micro-batch into tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rft_cluster.learner.packing import by_prompt
from rft_cluster.learner.prompt_cache import Encoder
from rft_cluster.messages import TrainingSample
from rft_cluster.model.encoder import EncodedPrompt
from rft_cluster.model.packed_row import PackedRow, joined, pack_row


@dataclass(frozen=True)
class Batch(PackedRow):
    """One micro-batch: a row that predicts C completion tokens, and what the loss needs to know of each."""

    generator_logprobs: Tensor  # [C] FP32, nats; [0] for targets of SFT
    advantages: Tensor  # [C] FP32
    weights: Tensor  # [C] FP32
    completions: tuple[TrainingSample, ...]  # whose tokens the C are, in their order

    def to(self, device: torch.device) -> "Batch":
        moved = self.__dataclass_fields__.keys() - {"completions"}
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


def collate(samples: Sequence[TrainingSample], encoder: Encoder, positions: Callable[[EncodedPrompt], Tensor]) -> Batch:
    """Make the tensors of one micro-batch. `positions` returns a prompt's M-RoPE positions [3, P].

    Raises:
        ValueError: the learner encodes a prompt into other tokens than the generator; the message has both counts.
    """
    groups = []  # (encoded prompt, its positions [3, P], its samples)
    for part in by_prompt(samples):
        prompt = encoder.encode(part[0].prompt)
        for sample in part:
            _check_same_tokens(sample, prompt.token_ids)
        groups.append((prompt, positions(prompt), part))
    # Sort prompts and completions by length: attention computes neighbouring segments of equal shape in one call.
    groups.sort(key=lambda group: len(group[0].token_ids))
    lengths = [len(prompt.token_ids) for prompt, _, _ in groups]
    rows = sorted(
        ((owner, sample) for owner, (_, _, part) in enumerate(groups) for sample in part),
        key=lambda row: (lengths[row[0]], len(row[1].token_ids)),
    )
    completions = tuple(sample for _, sample in rows)
    row = pack_row(
        [(prompt, places) for prompt, places, _ in groups], [(owner, sample.token_ids) for owner, sample in rows]
    )
    return Batch(
        **vars(row),
        generator_logprobs=torch.tensor(joined(sample.generator_logprobs for sample in completions)),
        advantages=torch.tensor(joined([sample.advantage] * len(sample.token_ids) for sample in completions)),
        weights=torch.tensor(joined([sample.weight] * len(sample.token_ids) for sample in completions)),
        completions=completions,
    )


def _check_same_tokens(sample: TrainingSample, ours: list[int]) -> None:
    if ours != sample.prompt_token_ids:
        raise ValueError(
            f"{sample.prompt.prompt_id}: the learner encodes the prompt into {len(ours)} tokens, the generator saw "
            f"{len(sample.prompt_token_ids)}; they must be equal, token for token"
        )
