import threading
from dataclasses import replace

import pytest
import torch

from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.model.encoder import EncodedPrompt

PROMPTS = {"a": [1, 9, 9, 2], "b": [1, 9, 3]}


def prompt(name: str) -> Prompt:
    return Prompt(name, f"photos/{name}.png", b"", "Which?", "rose", 0)


def asked(prompt_tokens: int, *lengths: int, name: str = "p") -> list[TrainingSample]:
    """Samples of one prompt, which adds `prompt_tokens` to a row; each completion adds its length less one."""
    return [
        TrainingSample(prompt(name), [1] * prompt_tokens, [number] * length, [-0.5] * length, 1.0, 0.125)
        for number, length in enumerate(lengths)
    ]


class Encoder:
    """Sees two patches for prompt a and one for b, whose values are the prompt's number."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        self.asked.append(prompt.prompt_id)
        number = "ab".index(prompt.prompt_id)
        patches = 2 - number
        pixels = torch.full((patches, 1176), float(number))
        return EncodedPrompt(PROMPTS[prompt.prompt_id], pixels, torch.tensor([[1, 1, patches]]))


def seen(name: str, image: bytes, text: str = "Which?") -> Prompt:
    return replace(prompt(name), image=image, text=text)


def test_what_comes_again_is_encoded_once():
    encoder = Encoder()
    cache = PromptCache(encoder, 1e6)
    first = cache.encode(seen("a", b"1"))
    assert cache.encode(replace(seen("a", b"1"), prompt_id="b", seed=3)) is first, "by content, not by name"
    assert encoder.asked == ["a"]
    cache.encode(seen("b", b"2"))
    cache.encode(seen("b", b"1", text="Which flower?"))
    assert encoder.asked == ["a", "b", "b"]


def test_the_cache_keeps_what_came_first_within_its_bytes():
    encoder = Encoder()
    cache = PromptCache(encoder, 3 * 1176 * 4)  # a has two patches, b one
    order = [seen("a", b"1"), seen("a", b"2"), seen("b", b"3")]
    for _ in range(3):
        for one in order:
            cache.encode(one)
    assert encoder.asked == ["a", "a", "b", "a", "a"], "only the second has no room"


class HeldUp(Encoder):
    """Encodes nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        assert self.go.wait(10)
        return super().encode(prompt)


def test_what_was_read_ahead_is_encoded_once_and_nobody_waits_for_it_before():
    encoder = HeldUp()
    cache = PromptCache(encoder, 0)  # no room: nothing is kept
    one, two = seen("a", b"1"), seen("b", b"2")
    cache.read_ahead([one, two], step=3)
    cache.read_ahead([two], step=4)
    assert encoder.asked == []
    encoder.go.set()
    first = cache.encode(one)
    assert first.token_ids == PROMPTS["a"]
    assert cache.encode(replace(one, prompt_id="b")) is first
    assert cache.encode(two).token_ids == PROMPTS["b"]
    assert encoder.asked == ["a", "b"]


def test_what_was_read_ahead_goes_with_its_step_and_later_steps_stay():
    encoder = Encoder()
    cache = PromptCache(encoder, 0)
    now, next_one = seen("a", b"1"), seen("b", b"2")
    cache.read_ahead([now], step=3)
    cache.read_ahead([next_one], step=4)
    cache.encode(now)
    cache.step_is_over(3)
    cache.encode(next_one)
    assert encoder.asked == ["a", "b"]
    cache.encode(now)
    assert encoder.asked == ["a", "b", "a"]


def test_what_was_read_ahead_needs_no_image_until_its_step_is_over():
    encoder = Encoder()
    cache = PromptCache(encoder, 0)
    cache.read_ahead([seen("a", b"1")], step=3)
    cache.read_ahead([seen("b", b"1")], step=4)  # the same image comes again
    assert cache.encode(seen("a", b"")) is cache.encode(seen("b", b""))
    cache.step_is_over(3)
    cache.encode(seen("b", b""))
    assert encoder.asked == ["a"]
    with pytest.raises(ValueError, match="a: came without its image, and was not read ahead"):
        cache.encode(seen("a", b""))


def test_what_a_later_step_asks_for_too_is_encoded_though_this_one_is_over():
    encoder = HeldUp()
    cache = PromptCache(encoder, 0)
    cache.read_ahead([seen("a", b"1"), seen("b", b"2")], step=3)  # one may be begun, the other waits
    cache.read_ahead([seen("b", b"2")], step=4)
    cache.step_is_over(3)
    encoder.go.set()
    assert cache.encode(seen("b", b"")).token_ids == PROMPTS["b"]


def test_what_is_not_asked_for_any_more_is_not_encoded():
    encoder = HeldUp()
    cache = PromptCache(encoder, 1e6)
    cache.read_ahead([seen("a", b"1"), seen("a", b"2"), seen("a", b"3")], step=0)  # the first is being encoded
    cache.step_is_over(0)
    encoder.go.set()
    assert cache.encode(seen("b", b"4")).token_ids == PROMPTS["b"]
    assert encoder.asked in (["a", "b"], ["b"])  # "b" alone where the thread had not begun


def test_what_cannot_be_encoded_says_so_when_it_is_asked_for():
    cache = PromptCache(Encoder(), 1e6)
    unknown = seen("c", b"1")
    cache.read_ahead([unknown], step=0)
    with pytest.raises(ValueError, match="substring"):
        cache.encode(unknown)
