from dataclasses import replace

import pytest
import torch
from some_prompt import some_prompt

from rft_cluster.data.images import image_sha256
from rft_cluster.learner.prompt_cache import TEXTS, PromptCache
from rft_cluster.messages import Augmentation
from rft_cluster.model.encoder import EncodedImage, EncodedPrompt

IMAGES = {image_sha256(image): image for image in (b"1", b"22", b"333", b"4444")}
PATCH = 1176 * 4  # bytes


class Encoder:
    """Sees as many patches as the image has bytes, and as many tokens as the text has letters."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self.changed: list[Augmentation | None] = []
        self.texts: list[str] = []

    def encode_text(self, text: str) -> list[int]:
        self.texts.append(text)
        return [1] * len(text)

    def encode_image(self, image: bytes, how: Augmentation | None = None) -> EncodedImage:
        self.images.append(image)
        self.changed.append(how)
        return EncodedImage(torch.zeros(len(image), 1176), torch.tensor([[1, 1, len(image)]]))

    def joined(self, text: list[int], image: EncodedImage) -> EncodedPrompt:
        return EncodedPrompt([*text, 9], image.pixel_values, image.image_grid_thw)


def test_an_image_is_encoded_once_whatever_is_asked_and_a_text_once_about_whatever_image():
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, 1e6)
    first = cache.encode(some_prompt("train/0/0", "a", b"1"))
    again = cache.encode(some_prompt("train/7/3", "b", b"1", seed=3))
    assert again.pixel_values is first.pixel_values, "by content, not by name"
    assert cache.encode(some_prompt("train/0/1", "c", b"22", text="Which?")).token_ids == [1] * 6 + [9]
    other = cache.encode(some_prompt("train/0/0", "a", b"1", text="Which?"))
    assert other.pixel_values is first.pixel_values and len(other.token_ids) == 7
    assert (encoder.texts, encoder.images) == (["Which flower?", "Which?"], [b"1", b"22"])


def test_an_augmentation_of_an_image_is_never_taken_for_another():
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, 1e6)
    prompt = some_prompt(image=b"22")
    turned, again, mirrored = (
        replace(prompt, example=prompt.example.changed(Augmentation((0, 0, 1, 1), flip, 10.0, (1, 1, 1))))
        for flip in (False, False, True)
    )
    whole, first = cache.encode(prompt), cache.encode(turned)
    assert cache.encode(again).pixel_values is first.pixel_values  # all completions of a group see the same
    assert len({id(one.pixel_values) for one in (whole, first, cache.encode(mirrored), cache.encode(prompt))}) == 3
    assert encoder.changed == [None, turned.example.image.augmentation, mirrored.example.image.augmentation]


def test_augmented_images_of_former_steps_take_no_room():
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, 3 * PATCH)
    plain = some_prompt(image=b"1")
    turned = replace(plain, example=plain.example.changed(Augmentation((0, 0, 1, 1), True, 10.0, (1, 1, 1))))
    first = cache.encode(plain)
    for _ in range(3):  # steps
        cache.forget_augmented()
        seen = cache.encode(turned)
        assert cache.encode(turned).pixel_values is seen.pixel_values, "within a step it is kept"
    assert cache.encode(plain).pixel_values is first.pixel_values
    assert len(encoder.images) == 4
    cache.forget_augmented()
    two = cache.encode(some_prompt(image=b"22"))
    assert cache.encode(some_prompt(image=b"22")).pixel_values is two.pixel_values, "the room is there again"
    assert cache.encode(plain).pixel_values is first.pixel_values


def test_with_room_for_some_those_are_found_each_epoch_and_the_latest_makes_room():
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, 6 * PATCH)
    for image in (b"333", b"22", b"1", b"4444", b"333"):  # 4444 takes the room of 1, then of 22, then of 333
        cache.encode(some_prompt(image=image))
    assert encoder.images == [b"333", b"22", b"1", b"4444", b"333"]
    for image in (b"333", b"22", b"22", b"333", b"1", b"22", b"333"):
        cache.encode(some_prompt(image=image))
    assert encoder.images[5:] == [b"22", b"1"], "all three fit"


def test_a_new_text_for_each_prompt_takes_no_room_of_images_and_their_bytes_stay_within_the_limit():
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, 5 * PATCH)
    for number in range(3 * TEXTS):
        cache.encode(some_prompt(image=(b"1", b"4444")[number % 2], text=str(number)))
        assert sum(kept.pixel_values.nbytes for kept in cache._kept.values()) <= 5 * PATCH
    assert encoder.images == [b"1", b"4444"]
    assert len(encoder.texts) == 3 * TEXTS and cache._tokens.cache_info().currsize == TEXTS


@pytest.mark.parametrize("patches", [0, 3])
def test_an_image_larger_than_the_limit_replaces_nothing(patches):
    encoder = Encoder()
    cache = PromptCache(encoder, IMAGES, patches * PATCH)
    for image in (b"22", b"4444", b"4444", b"22"):
        cache.encode(some_prompt(image=image))
    assert encoder.images == [b"22", b"4444", b"4444", *([] if patches else [b"22"])]


def test_an_image_that_is_none_of_the_run_is_no_blank():
    with pytest.raises(KeyError):
        PromptCache(Encoder(), IMAGES, 1e6).encode(some_prompt(image=b"another"))
