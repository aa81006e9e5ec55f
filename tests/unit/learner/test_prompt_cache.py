import pytest
import torch
from some_prompt import some_prompt

from rft_cluster.data.images import image_sha256
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.model.encoder import EncodedPrompt

IMAGES = {image_sha256(image): image for image in (b"1", b"22", b"333")}
PATCH = 1176 * 4  # bytes


class Encoder:
    """Sees as many patches as the image has bytes."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []

    def encode(self, text: str, image: bytes) -> EncodedPrompt:
        self.asked.append((text, image))
        return EncodedPrompt([1, 9, 2], torch.zeros(len(image), 1176), torch.tensor([[1, 1, len(image)]]))


def test_what_comes_again_is_encoded_once():
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, 1e6)
    first = cache.encode(some_prompt("train/0/0", "a", b"1"))
    assert cache.encode(some_prompt("train/7/3", "b", b"1", seed=3)) is first, "by content, not by name"
    cache.encode(some_prompt("train/0/1", "c", b"22"))
    cache.encode(some_prompt("train/0/0", "a", b"1", text="Which?"))
    assert encoder.asked == [("Which flower?", b"1"), ("Which flower?", b"22"), ("Which?", b"1")]


def test_the_cache_keeps_what_came_first_within_its_bytes():
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, 4 * PATCH)
    order = [some_prompt(image=image) for image in (b"333", b"22", b"1")]
    for _ in range(3):
        for one in order:
            cache.encode(one)
    assert [image for _, image in encoder.asked] == [b"333", b"22", b"1", b"22", b"22"], "only b has no room"


def test_an_image_that_is_none_of_the_run_is_no_blank():
    with pytest.raises(KeyError):
        PromptCache(Encoder(), IMAGES, 1e6).encode(some_prompt(image=b"another"))
