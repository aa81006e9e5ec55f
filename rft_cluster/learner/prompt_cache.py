"""Encoded prompts, ready before the update that needs them."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from rft_cluster.messages import Prompt
from rft_cluster.model.encoder import EncodedPrompt

# What an encoded prompt depends on: its image's SHA-256 and its text.
Content = tuple[bytes, str]


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
