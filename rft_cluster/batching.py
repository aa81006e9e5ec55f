"""From scored groups to the tensors of one forward.

    groups + advantages -> TrainingSamples -> for each rank: updates of micro-batches -> Batch

All ranks get equal numbers of micro-batches, since each forward is a collective under FSDP; where samples run
out, a sample of weight 0 pads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rft_cluster.messages import Group, Prompt, TrainingSample
from rft_cluster.qwen2vl import PromptEncoder

# One rank's work in one step: updates, each a list of micro-batches, each a list of samples.
RankWork = list[list[list[TrainingSample]]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B completions, T tokens at most in all, R at most in a completion; padded on the right."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    pixel_values: Tensor  # [patches of B images, 1176] FP32
    image_grid_thw: Tensor  # [B, 3] int64
    predictor_index: Tensor  # [B, R] int64: the position in T that predicts each completion token
    completion_ids: Tensor  # [B, R] int64
    mask: Tensor  # [B, R] bool: a real completion token
    generator_logprobs: Tensor  # [B, R] FP32, nats
    advantages: Tensor  # [B] FP32
    weights: Tensor  # [B] FP32

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def build_samples(
    groups: Sequence[Group], advantages: Sequence[Sequence[float | None]], keep_all: bool
) -> list[TrainingSample]:
    """Samples whose weights make the loss a mean over each completion's tokens, then over all completions.

    A group without variance has advantages of 0: it pulls nothing but the KL. With `keep_all` false (no KL) its
    samples are left out, but still count in the mean. A masked completion (advantage None) is left out always, and
    does not count.
    """
    total = sum(advantage is not None for group_advantages in advantages for advantage in group_advantages)
    return [
        TrainingSample(
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            token_ids=completion.token_ids,
            generator_logprobs=completion.generator_logprobs,
            advantage=advantage,
            weight=1.0 / (len(completion.token_ids) * total),
            policy_version=completion.policy_version,
        )
        for group, group_advantages in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, group_advantages, strict=True)
        if advantage is not None and (keep_all or advantage != 0.0)
    ]


def split_work(samples: Sequence[TrainingSample], ranks: int, updates: int, micro_batch: int) -> list[RankWork]:
    """Deal a step's samples to ranks: `result[rank][update][forward]` is a list of samples.

    Each update takes a share of the samples, its weights scaled up so that they mean the same as a whole step's.
    """
    work: list[RankWork] = [[] for _ in range(ranks)]
    for update in range(updates):
        chosen = samples[update * len(samples) // updates : (update + 1) * len(samples) // updates]
        scaled = [replace(sample, weight=sample.weight * len(samples) / len(chosen)) for sample in chosen]
        shares = [scaled[rank * len(scaled) // ranks : (rank + 1) * len(scaled) // ranks] for rank in range(ranks)]
        forwards = max(-(-len(share) // micro_batch) for share in shares)
        for rank, share in enumerate(shares):
            batches = [share[i * micro_batch : (i + 1) * micro_batch] for i in range(forwards)]
            work[rank].append([batch or [replace(scaled[0], weight=0.0)] for batch in batches])
    return work


def collate(samples: Sequence[TrainingSample], encoder: PromptEncoder, pad_id: int) -> Batch:
    """The tensors of one forward.

    Raises:
        ValueError: the encoder sees other prompt tokens than the generator did (both counts are named).
    """
    encoded = {}
    for sample in samples:
        prompt = sample.prompt
        if prompt.prompt_id not in encoded:
            encoded[prompt.prompt_id] = encoder.encode(prompt)
            _check_same_tokens(prompt, encoded[prompt.prompt_id].token_ids, sample.prompt_token_ids)
    prompts = [encoded[sample.prompt.prompt_id] for sample in samples]
    rows = [sample.prompt_token_ids + sample.token_ids for sample in samples]
    width = max(len(row) for row in rows)
    longest = max(len(sample.token_ids) for sample in samples)
    starts = torch.tensor([len(sample.prompt_token_ids) for sample in samples])
    lengths = torch.tensor([len(sample.token_ids) for sample in samples])
    offsets = torch.arange(longest)
    return Batch(
        input_ids=torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]),
        attention_mask=(torch.arange(width) < (starts + lengths)[:, None]).long(),
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]),
        predictor_index=(starts[:, None] - 1 + offsets).clamp(max=width - 1),
        completion_ids=_padded([sample.token_ids for sample in samples], longest, 0),
        mask=offsets < lengths[:, None],
        generator_logprobs=_padded([sample.generator_logprobs for sample in samples], longest, 0.0),
        advantages=torch.tensor([sample.advantage for sample in samples]),
        weights=torch.tensor([sample.weight for sample in samples]),
    )


def _padded(rows: Sequence[Sequence[float]], width: int, value: float) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _check_same_tokens(prompt: Prompt, ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        raise ValueError(
            f"{prompt.prompt_id}: the learner encodes the prompt into {len(ours)} tokens, the generator saw "
            f"{len(theirs)}; they must be equal, token for token"
        )
