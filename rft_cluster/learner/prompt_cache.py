"""A cache of encoded prompts."""

from functools import lru_cache
from typing import Protocol

from rft_cluster.messages import Augmentation, ImageRef, Images, Prompt
from rft_cluster.model.encoder import EncodedImage, EncodedPrompt, PromptEncoder

Seen = tuple[str, Augmentation | None]  # an image's SHA-256, and how it is changed
TEXTS = 256  # kept as tokens: at 1,000 tokens a text about 10 MB


class Encoder(Protocol):
    """The interface of `PromptCache` that `collate` uses."""

    def encode(self, prompt: Prompt) -> EncodedPrompt: ...


class PromptCache:
    """Encodes prompts, and keeps the pixels by image and augmentation, in at most `capacity` bytes, and tokens by text.

    They are apart because a question that lists the classes has another text in each prompt, while images recur. A rank
    encodes only the prompts of its own samples, when their micro-batch is collated. That runs during the computation of
    the previous micro-batch, so the learner waits only for the images of the first one.

    An image that has no room replaces those that were used last, not longest ago: images recur once an epoch, in
    another order each time, so the latest are needed again last. With room for half of the images, half of them are
    found; if the oldest were replaced, 15 % (simulated, 400 images, 200 epochs).
    """

    def __init__(self, encoder: PromptEncoder, images: Images, capacity: float) -> None:
        self._encoder, self._images = encoder, images
        self._capacity = self._room = capacity
        self._kept: dict[Seen, EncodedImage] = {}  # the latest last
        self._tokens = lru_cache(maxsize=TEXTS)(encoder.encode_text)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        return self._encoder.joined(self._tokens(prompt.text), self._image(prompt.example.image))

    def forget_augmented(self) -> None:
        """Give back the room of augmented images: each step draws others, so no one asks for them again."""
        for seen in [seen for seen in self._kept if seen[1] is not None]:
            self._room += self._kept.pop(seen).pixel_values.nbytes

    def _image(self, reference: ImageRef) -> EncodedImage:
        seen = reference.sha256, reference.augmentation
        image = self._kept.pop(seen, None)
        if image:
            self._room += image.pixel_values.nbytes
        else:
            image = self._encoder.encode_image(self._images[reference.sha256], reference.augmentation)
        self._keep(seen, image)
        return image

    def _keep(self, seen: Seen, image: EncodedImage) -> None:
        """Keep an image as the latest, in place of earlier ones if need be, unless it has no room at all."""
        size = image.pixel_values.nbytes
        if size > self._capacity:
            return
        while size > self._room:
            _, replaced = self._kept.popitem()
            self._room += replaced.pixel_values.nbytes
        self._room -= size
        self._kept[seen] = image
