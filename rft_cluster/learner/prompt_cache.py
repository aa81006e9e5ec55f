"""A cache of encoded prompts."""

from typing import Protocol

from rft_cluster.messages import Images, Prompt
from rft_cluster.model.encoder import EncodedPrompt, PromptEncoder


class Encoder(Protocol):
    """The interface of `PromptCache` that `collate` uses."""

    def encode(self, prompt: Prompt) -> EncodedPrompt: ...


class PromptCache:
    """Encodes prompts, and keeps them by image and text until they fill `capacity` bytes.

    A rank encodes only the prompts of its own samples, when their micro-batch is collated. That runs during the
    computation of the previous micro-batch, so the learner waits only for the images of the first one. Nothing is
    evicted: images recur once an epoch, so evicting the oldest would always evict the next one needed.
    """

    def __init__(self, encoder: PromptEncoder, images: Images, capacity: float) -> None:
        self._encoder, self._images = encoder, images
        self._room = capacity
        self._kept: dict[tuple[str, str], EncodedPrompt] = {}  # by the image's SHA-256 and the text

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        sha256 = prompt.example.image.sha256
        known = self._kept.get((sha256, prompt.text))
        if known is not None:
            return known
        encoded = self._encoder.encode(prompt.text, self._images[sha256])
        if encoded.pixel_values.nbytes <= self._room:
            self._room -= encoded.pixel_values.nbytes
            self._kept[sha256, prompt.text] = encoded
        return encoded
