"""A step's work in numbers: rows of the learners, tokens, patches and pairs for attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rft_cluster.config import Config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import MERGED


@dataclass(frozen=True)
class Prompts:
    """The prompts of one split: how many, their mean length, and all lengths, longest first."""

    count: int
    mean: PromptLength
    longest: tuple[PromptLength, ...]

    @classmethod
    def of(cls, lengths: Sequence[PromptLength]) -> "Prompts":
        if not lengths:
            return cls(0, PromptLength(0, 0), ())
        mean = PromptLength(round(fmean(one.image for one in lengths)), round(fmean(one.text for one in lengths)))
        return cls(len(lengths), mean, tuple(sorted(lengths, key=lambda one: one.tokens, reverse=True)))


@dataclass(frozen=True)
class Row:
    """One micro-batch of a learner, or the sum of several: the prompts' tokens and patches once, and completions.

    `keys`: rows that attention gathers, of every prompt and, for every completion, of its prompt and itself.
    `pairs`, `patch_pairs`: of a query and a key that it attends to, in the text and in the vision layers.
    `predicted`: completion tokens, whose log-probabilities are computed.
    """

    prompts: float
    tokens: float
    patches: float
    keys: float
    pairs: float
    patch_pairs: float
    predicted: float

    def __add__(self, other: "Row") -> "Row":
        return Row(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, factor: float) -> "Row":
        return Row(*(factor * getattr(self, name) for name in self.__dataclass_fields__))


EMPTY = Row(0, 0, 0, 0, 0, 0, 0)


def group_row(prompt: PromptLength, completions: float, length: float) -> Row:
    """The row of one prompt and its completions of `length` tokens each. Their last tokens are not in it."""
    asked, patches, read = prompt.tokens, prompt.image * MERGED, length - 1
    return Row(
        prompts=1,
        tokens=asked + completions * read,
        patches=patches,
        keys=asked + completions * (asked + read),
        pairs=asked * asked / 2 + completions * (asked * read + read * read / 2),  # causal: half of a square
        patch_pairs=patches * patches,
        predicted=completions * length,
    )


def fullest_row(longest: Sequence[PromptLength], completions: int, length: int, limit: int) -> Row:
    """The largest micro-batch of at most `limit` tokens: of these prompts, longest first, as many as it holds.

    A group that exceeds the limit is cut: as many of its completions as fit, but at least one.
    """
    whole = EMPTY
    for prompt in longest:
        if whole.tokens + prompt.tokens + completions * (length - 1) <= limit:
            whole += group_row(prompt, completions, length)
    if whole.prompts:
        return whole
    fitting = (limit - longest[0].tokens) // max(1, length - 1)
    return group_row(longest[0], min(completions, max(1, fitting)), length)


@dataclass(frozen=True)
class Share:
    """One learner's part of a step: the sum of its rows, and how many there are."""

    row: Row
    micro_batches: int


def learner_share(config: Config, prompt: PromptLength, length: float) -> Share:
    """A learner's part of a step with prompts of this length and completions of `length` tokens."""
    updates = config.algorithm.updates_per_step
    groups = config.schedule.prompts_per_step / config.learners.count / updates  # of an update
    size, limit = config.completions, config.learners.micro_batch_tokens
    group = group_row(prompt, size, length)
    if group.tokens <= limit:
        a_row = limit // group.tokens  # groups in a micro-batch
        return Share(group.times(groups * updates), updates * math.ceil(groups / a_row))
    fitting = max(1, (limit - prompt.tokens) // max(1, length - 1))  # completions in a piece of a group
    pieces = -(-size // fitting)
    piece = group_row(prompt, size / pieces, length)
    return Share(piece.times(groups * updates * pieces), updates * math.ceil(groups * pieces))
