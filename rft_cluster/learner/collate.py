"""Turn the samples of a micro-batch into tensors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from rft_cluster.learner.packing import by_prompt
from rft_cluster.learner.prompt_cache import Encoder
from rft_cluster.messages import TrainingSample
from rft_cluster.model.encoder import EncodedPrompt
from rft_cluster.model.shared_prefix import PackLayout, pack_layout


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a row of T tokens, without padding, that predicts C completion tokens.

    The row has the prompts, then the completions without their last tokens, which predict nothing.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [3, 1, T] int64: M-RoPE; every completion continues the positions of its prompt
    layout: PackLayout
    pixel_values: Tensor  # [patches of all prompts' images, 1176] FP32
    image_grid_thw: Tensor  # [prompts, 3] int64
    predictor_index: Tensor  # [C] int64: the position in T that predicts each completion token
    completion_ids: Tensor  # [C] int64
    generator_logprobs: Tensor  # [C] FP32, nats
    advantages: Tensor  # [C] FP32
    weights: Tensor  # [C] FP32
    completions: tuple[TrainingSample, ...]  # whose tokens the C are, in their order

    def to(self, device: torch.device) -> "Batch":
        moved = self.__dataclass_fields__.keys() - {"completions"}
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    def inputs(self) -> dict[str, Any]:
        """The arguments of `PolicyModel.forward`."""
        names = ("input_ids", "position_ids", "layout", "pixel_values", "image_grid_thw")
        return {name: getattr(self, name) for name in (*names, "predictor_index", "completion_ids")}


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
    ends = list(accumulate(lengths))  # where each prompt ends in the row
    rows = sorted(
        ((owner, sample) for owner, (_, _, part) in enumerate(groups) for sample in part),
        key=lambda row: (lengths[row[0]], len(row[1].token_ids)),
    )
    owners = [owner for owner, _ in rows]
    completions = tuple(sample for _, sample in rows)
    # The row leaves out each completion's last token: nothing after it needs a prediction.
    read = [sample.token_ids[:-1] for sample in completions]
    starts = accumulate((len(tokens) for tokens in read), initial=ends[-1])
    # A completion's positions continue after the largest of its prompt's, the same in all three M-RoPE dimensions. They
    # do not depend on where the completion is in the row.
    going_on = [  # [3, R - 1] each
        (groups[owner][1].max() + 1 + torch.arange(len(tokens))).expand(3, -1)
        for owner, tokens in zip(owners, read, strict=True)
    ]
    # Position t predicts token t + 1. The prompt's last position predicts the first token of all its completions.
    predictors = [  # [R] each
        [ends[owner] - 1, *range(start, start + len(tokens))]
        for owner, start, tokens in zip(owners, starts, read, strict=False)
    ]
    return Batch(
        input_ids=torch.tensor([_joined([*(prompt.token_ids for prompt, _, _ in groups), *read])]),
        position_ids=torch.cat([*(own for _, own, _ in groups), *going_on], dim=1)[:, None],
        layout=pack_layout(lengths, [len(tokens) for tokens in read], owners),
        pixel_values=torch.cat([prompt.pixel_values for prompt, _, _ in groups]),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt, _, _ in groups]),
        predictor_index=torch.tensor(_joined(predictors)),
        completion_ids=torch.tensor(_joined(sample.token_ids for sample in completions)),
        generator_logprobs=torch.tensor(_joined(sample.generator_logprobs for sample in completions)),
        advantages=torch.tensor(_joined([sample.advantage] * len(sample.token_ids) for sample in completions)),
        weights=torch.tensor(_joined([sample.weight] * len(sample.token_ids) for sample in completions)),
        completions=completions,
    )


def _joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def _check_same_tokens(sample: TrainingSample, ours: list[int]) -> None:
    if ours != sample.prompt_token_ids:
        raise ValueError(
            f"{sample.prompt.prompt_id}: the learner encodes the prompt into {len(ours)} tokens, the generator saw "
            f"{len(sample.prompt_token_ids)}; they must be equal, token for token"
        )
