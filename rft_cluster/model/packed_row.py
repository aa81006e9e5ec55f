"""The policy's input: one row of prompts and completions, without padding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, Self

import torch
from torch import Tensor

from rft_cluster.model.encoder import EncodedPrompt
from rft_cluster.model.shared_prefix import PackLayout, pack_layout


@dataclass(frozen=True)
class PackedRow:
    """A row of T tokens that predicts C completion tokens.

    The row has the prompts, then the completions without their last tokens, which predict nothing.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [3, 1, T] int64: M-RoPE; every completion continues the positions of its prompt
    layout: PackLayout
    pixel_values: Tensor  # [patches of all prompts' images, values of a patch] FP32
    image_grid_thw: Tensor  # [prompts, 3] int64
    predictor_index: Tensor  # [C] int64: the position in T that predicts each completion token
    completion_ids: Tensor  # [C] int64

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})

    def inputs(self) -> dict[str, Any]:
        """The arguments of `PolicyModel.forward`."""
        names = ("input_ids", "position_ids", "layout", "pixel_values", "image_grid_thw")
        return {name: getattr(self, name) for name in (*names, "predictor_index", "completion_ids")}


def pack_row(
    prompts: Sequence[tuple[EncodedPrompt, Tensor]], completions: Sequence[tuple[int, Sequence[int]]]
) -> PackedRow:
    """The row of these prompts and completions, in this order.

    Attention computes neighbouring segments of equal shape in one call, so both should be sorted by length.

    Args:
        prompts: with their M-RoPE positions [3, P].
        completions: the index of the prompt, and the token ids.
    """
    lengths = [len(prompt.token_ids) for prompt, _ in prompts]
    ends = list(accumulate(lengths))  # where each prompt ends in the row
    owners = [owner for owner, _ in completions]
    # The row leaves out each completion's last token: nothing after it needs a prediction.
    read = [list(tokens[:-1]) for _, tokens in completions]
    starts = accumulate((len(tokens) for tokens in read), initial=ends[-1])
    # A completion's positions continue after the largest of its prompt's, the same in all three M-RoPE dimensions. They
    # do not depend on where the completion is in the row.
    going_on = [  # [3, R - 1] each
        (prompts[owner][1].max() + 1 + torch.arange(len(tokens))).expand(3, -1)
        for owner, tokens in zip(owners, read, strict=True)
    ]
    # Position t predicts token t + 1. The prompt's last position predicts the first token of all its completions.
    predictors = [  # [R] each
        [ends[owner] - 1, *range(start, start + len(tokens))]
        for owner, start, tokens in zip(owners, starts, read, strict=False)
    ]
    return PackedRow(
        input_ids=torch.tensor([joined([*(prompt.token_ids for prompt, _ in prompts), *read])]),
        position_ids=torch.cat([*(own for _, own in prompts), *going_on], dim=1)[:, None],
        layout=pack_layout(lengths, [len(tokens) for tokens in read], owners),
        pixel_values=torch.cat([prompt.pixel_values for prompt, _ in prompts]),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt, _ in prompts]),
        predictor_index=torch.tensor(joined(predictors)),
        completion_ids=torch.tensor(joined(tokens for _, tokens in completions)),
    )


def joined(lists: Iterable[Sequence[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))
