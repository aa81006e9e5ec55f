"""From scored groups to the tensors of one forward.

    groups + advantages -> TrainingSamples -> for each rank: updates of micro-batches -> Batch

A micro-batch reads each prompt and image once, for all of its completions in it. All ranks get equal numbers of
micro-batches, since each forward is a collective under FSDP.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, Protocol

import torch
from torch import Tensor

from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.model.policy import EncodedPrompt
from rft_cluster.model.shared_prefix import PackLayout, pack_layout

# Samples of one prompt: a group, or a part of one.
Part = list[TrainingSample]
# One rank's work in one step: updates, each a list of micro-batches, each a list of samples.
RankWork = list[list[list[TrainingSample]]]
# What an encoded prompt depends on: its image's SHA-256 and its text.
Content = tuple[bytes, str]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a row of T tokens, in which C completion tokens are predicted. Nothing is padded.

    The row holds the prompts, then the completions without their last tokens, which predict nothing.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [3, 1, T] int64: M-RoPE; every completion goes on where its prompt ends
    layout: PackLayout
    pixel_values: Tensor  # [patches of all prompts' images, 1176] FP32
    image_grid_thw: Tensor  # [prompts, 3] int64
    predictor_index: Tensor  # [C] int64: the position in T that predicts each completion token
    completion_ids: Tensor  # [C] int64
    generator_logprobs: Tensor  # [C] FP32, nats
    advantages: Tensor  # [C] FP32
    weights: Tensor  # [C] FP32

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})

    def inputs(self) -> dict[str, Any]:
        """The arguments of `PolicyModel.forward`."""
        names = ("input_ids", "position_ids", "layout", "pixel_values", "image_grid_thw")
        return {name: getattr(self, name) for name in (*names, "predictor_index", "completion_ids")}


# From samples to ranks
def split_work(samples: Sequence[TrainingSample], ranks: int, updates: int, micro_batch_tokens: int) -> list[RankWork]:
    """Deal a step's samples to ranks: `result[rank][update][forward]` is a list of samples.

    Each update takes a share of the samples, its weights scaled up so that they mean the same as a whole step's. Its
    groups are dealt so that the ranks' tokens are as equal as may be; a group is divided where that helps, and its
    prompt then read twice. A forward has `micro_batch_tokens` at most, unless one completion with its prompt has more.
    """
    work: list[RankWork] = [[] for _ in range(ranks)]
    for update in range(updates):
        chosen = samples[update * len(samples) // updates : (update + 1) * len(samples) // updates]
        scaled = [replace(sample, weight=sample.weight * len(samples) / len(chosen)) for sample in chosen]
        packs = [_pack(share, micro_batch_tokens) for share in _balance(_by_prompt(scaled), ranks)]
        forwards = max(map(len, packs))
        for rank, own in enumerate(packs):
            while len(own) < forwards:
                own.append(_split_off(own) or [[_padding(scaled)]])
            # All ranks' large forwards at the same time: each waits for the slowest at every layer.
            own.sort(key=_row_tokens, reverse=True)
            work[rank].append([[sample for part in parts for sample in part] for parts in own])
    return work


def _tokens(part: Part) -> int:
    """Tokens that a part adds to a row: the prompt, and the completions without their last tokens."""
    return len(part[0].prompt_token_ids) + sum(len(sample.token_ids) - 1 for sample in part)


def _row_tokens(parts: Sequence[Part]) -> int:
    return sum(map(_tokens, parts))


def _by_prompt(samples: Sequence[TrainingSample]) -> list[Part]:
    parts: dict[str, Part] = {}
    for sample in samples:
        parts.setdefault(sample.prompt.prompt_id, []).append(sample)
    return list(parts.values())


def _halves(part: Part) -> list[Part]:
    return [part[: len(part) // 2], part[len(part) // 2 :]]


def _balance(parts: list[Part], ranks: int) -> list[list[Part]]:
    """Each rank's parts. A part is halved as long as that lowers the tokens of the rank that has most."""
    shares, loads = _deal(parts, ranks)
    while True:
        fullest = shares[loads.index(max(loads))]
        largest = max((part for part in fullest if len(part) > 1), key=_tokens, default=None)
        if largest is None:
            return shares
        parts = [part for part in parts if part is not largest] + _halves(largest)
        finer, finer_loads = _deal(parts, ranks)
        if sorted(finer_loads, reverse=True) >= sorted(loads, reverse=True):
            return shares
        shares, loads = finer, finer_loads


def _deal(parts: list[Part], ranks: int) -> tuple[list[list[Part]], list[int]]:
    """Largest first, each to the rank that has least; the ranks' parts, and their tokens."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for part in sorted(parts, key=_tokens, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].append(part)
        loads[rank] += _tokens(part)
    return shares, loads


def _pack(parts: list[Part], limit: int) -> list[list[Part]]:
    """Fill forwards, largest part first, each part into the first that has room."""
    forwards: list[list[Part]] = []
    pieces = [piece for part in parts for piece in _cut(part, limit)]
    for piece in sorted(pieces, key=_tokens, reverse=True):
        for forward in forwards:
            if _row_tokens(forward) + _tokens(piece) <= limit:
                forward.append(piece)
                break
        else:
            forwards.append([piece])
    return forwards


def _cut(part: Part, limit: int) -> list[Part]:
    """Halve a part until each piece has `limit` tokens at most, or one completion."""
    if len(part) == 1 or _tokens(part) <= limit:
        return [part]
    return [piece for half in _halves(part) for piece in _cut(half, limit)]


def _split_off(forwards: list[list[Part]]) -> list[Part] | None:
    """Take a share of the largest forward that can be divided; None if all are of one completion."""
    for parts in sorted(forwards, key=_row_tokens, reverse=True):
        if len(parts) > 1:
            return [parts.pop()]
        if len(parts[0]) > 1:
            parts[0], other = _halves(parts[0])
            return [other]
    return None


def _padding(samples: Sequence[TrainingSample]) -> TrainingSample:
    """A sample that changes nothing: real, so that its forward is a usual one, but of weight 0."""
    return replace(min(samples, key=lambda sample: _tokens([sample])), weight=0.0)


# From samples to tensors


class Encoder(Protocol):
    """A `PromptEncoder`, or a `PromptCache` before one."""

    def encode(self, prompt: Prompt) -> EncodedPrompt: ...


class PromptCache:
    """Encodes prompts in a thread of its own, and keeps them by what they contain until they fill `capacity` bytes.

    What came first stays: the images come again once an epoch, so that to throw out the oldest would be to throw out
    each shortly before it is asked for. What was read ahead and finds no room is held until its step is over; so long
    it may be asked for by a prompt without its image, which need not travel twice.
    """

    def __init__(self, encoder: Encoder, capacity: float) -> None:
        self._encoder = encoder
        self._room = capacity
        self._kept: dict[Content, EncodedPrompt] = {}
        self._ahead: dict[int, dict[Content, Future[EncodedPrompt]]] = {}  # by step
        self._contents: dict[int, dict[str, Content]] = {}  # by step and prompt's id
        self._thread = ThreadPoolExecutor(1, "prompts")  # one: a tokenizer refuses to be used by two at once

    def read_ahead(self, prompts: Iterable[Prompt], step: int) -> None:
        """Begin to encode what a step will ask for, without waiting."""
        ahead, contents = self._ahead.setdefault(step, {}), self._contents.setdefault(step, {})
        for prompt in prompts:
            content = contents[prompt.prompt_id] = _content(prompt)
            if content not in self._kept:
                ahead[content] = self._coming(content) or self._thread.submit(self._encoder.encode, prompt)

    def step_is_over(self, step: int) -> None:
        """Drop what was read ahead for this step and those before it, and was not asked for or has no room."""
        for over in [key for key in self._ahead if key <= step]:
            del self._contents[over]
            for content, coming in self._ahead.pop(over).items():
                if self._coming(content) is None:  # no later step asks for it
                    coming.cancel()

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Of a prompt with its image, or without it if it was read ahead for a step that is not over.

        Raises:
            ValueError: it has none, and was not.
        """
        content = _content(prompt) if prompt.image else self._content_of(prompt.prompt_id)
        if content in self._kept:
            return self._kept[content]
        coming = self._coming(content) or self._thread.submit(self._encoder.encode, prompt)
        encoded = coming.result()
        if encoded.pixel_values.nbytes <= self._room:
            self._room -= encoded.pixel_values.nbytes
            self._kept[content] = encoded
        return encoded

    def _content_of(self, prompt_id: str) -> Content:
        for contents in self._contents.values():
            if prompt_id in contents:
                return contents[prompt_id]
        raise ValueError(f"{prompt_id}: came without its image, and was not read ahead")

    def _coming(self, content: Content) -> "Future[EncodedPrompt] | None":
        return next((ahead[content] for ahead in self._ahead.values() if content in ahead), None)


def _content(prompt: Prompt) -> Content:
    return hashlib.sha256(prompt.image).digest(), prompt.text


def collate(samples: Sequence[TrainingSample], encoder: Encoder, positions: Callable[[EncodedPrompt], Tensor]) -> Batch:
    """The tensors of one forward. `positions` gives a prompt's M-RoPE positions [3, P].

    Raises:
        ValueError: the encoder sees other prompt tokens than the generator did (both counts are named).
    """
    groups = []
    for part in _by_prompt(samples):
        prompt = encoder.encode(part[0].prompt)
        for sample in part:
            _check_same_tokens(sample, prompt.token_ids)
        groups.append((prompt, positions(prompt), part))
    # Sorted by length, so that segments of one shape are neighbours: attention takes those together.
    groups.sort(key=lambda group: len(group[0].token_ids))
    lengths = [len(prompt.token_ids) for prompt, _, _ in groups]
    ends = list(accumulate(lengths))
    rows = sorted(
        ((owner, sample) for owner, (_, _, part) in enumerate(groups) for sample in part),
        key=lambda row: (lengths[row[0]], len(row[1].token_ids)),
    )
    owners = [owner for owner, _ in rows]
    completions = [sample for _, sample in rows]
    read = [sample.token_ids[:-1] for sample in completions]
    starts = accumulate((len(tokens) for tokens in read), initial=ends[-1])
    going_on = [
        (groups[owner][1].max() + 1 + torch.arange(len(tokens))).expand(3, -1)
        for owner, tokens in zip(owners, read, strict=True)
    ]
    predictors = [
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
    )


def _joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def _check_same_tokens(sample: TrainingSample, ours: list[int]) -> None:
    if ours != sample.prompt_token_ids:
        raise ValueError(
            f"{sample.prompt.prompt_id}: the learner encodes the prompt into {len(ours)} tokens, the generator saw "
            f"{len(sample.prompt_token_ids)}; they must be equal, token for token"
        )
