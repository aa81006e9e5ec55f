"""Log-probabilities of given answers, by the learner's packed forward: no engine, and no vocabulary-sized output.

    row      [ image and question | what is written before | name 1 | name 2 | ... ]

One row holds all that the answers share once, and each answer's own tokens. Attention is that of `shared_prefix.py`.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch

from rft_cluster.common.hardware import hardware
from rft_cluster.common.imports import light_imports
from rft_cluster.config import ModelSection
from rft_cluster.model.computing import set_up_torch, within_memory
from rft_cluster.model.encoder import EncodedPrompt, PromptEncoder
from rft_cluster.model.families.family import STOP_TOKENS
from rft_cluster.model.packed_row import pack_row
from rft_cluster.model.policy import PolicyModel, load_reference, move_to

with light_imports():
    from transformers.utils import logging as hf_logging


# Keys that a row's answers attend to: for each answer the prompt's and its own. Keys, and values, of a layer of a 2B
# model are 0.5 GB in FP32. After 1,300 tokens 400 answers are one row: 200 names in two forms.
MOST_KEYS = 2**19
WHO = "the policy that scores the classes"  # in messages


class ClassScorer:
    """A frozen policy that says how probable answers are. `cluster/` makes it a Ray actor; `predict` calls it here."""

    def __init__(self, model: ModelSection, device: str, dtype: str | None = None, threads: int | None = None) -> None:
        """`dtype`: None for the device's own (`common.hardware`). `threads`: None for torch's own choice."""
        set_up_torch(threads)
        hf_logging.disable_progress_bar()  # it would show what takes a second
        self._model, self._hardware = model, hardware(device, dtype)
        self._loaded: tuple[PromptEncoder, PolicyModel] | None = None
        # The last prompt: an image is asked about several times in a row, and decoding takes as long as a forward.
        self._asked: tuple[tuple[bytes, str], EncodedPrompt] | None = None

    def load(self, path: str) -> None:
        """Load the policy in this folder, in place of the one before.

        Raises:
            UserError: it cannot be loaded here, or the GPU's memory is taken by others.
        """
        self._loaded = self._asked = None  # not two models at a time in the device's memory
        encoder = PromptEncoder(path, self._model)
        attention, forbidden = self._hardware.attention, encoder.forbidden_token_ids
        # An export is in BF16, so nothing is lost when it is loaded in BF16 and computed with in FP32.
        policy = load_reference(path, self._model, attention, forbidden, temperature=1.0)
        with within_memory(WHO):
            move_to(policy, self._hardware.device, self._hardware.dtype)
        self._loaded = encoder, policy

    def logprobs(
        self, image: bytes, question: str, before: str, answers: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """How probable each answer is as the rest of a completion that begins with `before`.

        Args:
            image: encoded.
            question: the prompt's text.
            before: what the completion has up to the answer.
            answers: each with all that follows it, but the token that ends the completion, which is added.

        Returns:
            log-probabilities [answers] FP64 in nats, of all tokens of the answer and of the end, at temperature 1 and
            without the tokens that a generator never samples; and the numbers of these tokens [answers].

        Raises:
            UserError: the GPU's memory is taken by others.
        """
        assert self._loaded, "load a policy first"
        encoder, policy = self._loaded
        texts = [before.removeprefix(encoder.opening) + answer for answer in answers]
        with torch.inference_mode(), within_memory(WHO):
            return answer_logprobs(policy, encoder, self._encoded(encoder, image, question), texts)

    def _encoded(self, encoder: PromptEncoder, image: bytes, question: str) -> EncodedPrompt:
        if self._asked is None or self._asked[0] != (image, question):
            self._asked = (image, question), encoder.encode(question, image)
        return self._asked[1]


def answer_logprobs(
    policy: PolicyModel, encoder: PromptEncoder, prompt: EncodedPrompt, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """See `ClassScorer.logprobs`, for completions that are `texts`. What all begin with is in the row once."""
    completions = answer_tokens(encoder, texts)
    shared = shared_length(completions)
    asked = EncodedPrompt([*prompt.token_ids, *completions[0][:shared]], prompt.pixel_values, prompt.image_grid_thw)
    own = [completion[shared:] for completion in completions]
    order = sorted(range(len(own)), key=lambda index: len(own[index]))  # attention computes equal lengths in one call
    positions, device = policy.prompt_positions(asked), next(policy.parameters()).device
    counts, sums = np.array([len(tail) for tail in own]), np.empty(len(own))
    size = max(1, MOST_KEYS // len(asked.token_ids))
    for some in (order[first : first + size] for first in range(0, len(order), size)):
        row = pack_row([(asked, positions)], [(0, own[index]) for index in some])
        # In BF16 logits of 16 to 32 have steps of 0.125 nats, and a fitted temperature below 1 makes more of them.
        tokens, _ = policy(**row.to(device).inputs(), exact=True)
        sums[some] = [float(part.double().sum()) for part in tokens.cpu().split(counts[some].tolist())]
    return sums, counts


def answer_tokens(encoder: PromptEncoder, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of completions of these texts, each with the one that ends it.

    What looks like a special token is read as the characters that it is written with: nothing else was sampled.
    """
    written = encoder.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = encoder.tokenizer.convert_tokens_to_ids(STOP_TOKENS[0])
    return [[*tokens, end] for tokens in written]


def shared_length(completions: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all completions begin with; each keeps at least one of its own.

    Tokens are compared, not characters: a name's first letters may be in one token with the `>` before them.
    """
    columns = zip(*(completion[:-1] for completion in completions), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
