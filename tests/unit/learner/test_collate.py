from dataclasses import replace

import pytest
import torch
from some_prompt import some_prompt

from rft_cluster.algorithm import load_algorithm
from rft_cluster.config import load_config
from rft_cluster.learner.collate import collate
from rft_cluster.messages import Completion, Group, Prompt, TrainingSample
from rft_cluster.model.encoder import EncodedPrompt

PROMPTS = {"a": [1, 9, 9, 2], "b": [1, 9, 3]}


def prompt(name: str) -> Prompt:
    return some_prompt(name, f"photos/{name}.png", b"", "Which?", "rose", 0)


def group(name: str, *lengths: int) -> Group:
    completions = [Completion([10] * n, [-0.5] * n, "x", "stop", 7) for n in lengths]
    return Group(prompt(name), PROMPTS[name], completions)


def asked(prompt_tokens: int, *lengths: int, name: str = "p") -> list[TrainingSample]:
    """Samples of one prompt, which adds `prompt_tokens` to a row; each completion adds its length less one."""
    return [
        TrainingSample(prompt(name), [1] * prompt_tokens, [number] * length, [-0.5] * length, 1.0, 0.125, number)
        for number, length in enumerate(lengths)
    ]


def shape(batch: list[TrainingSample]) -> list[tuple[str, int]]:
    return [(one.prompt.prompt_id, len(one.token_ids)) for one in batch]


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


def positions(prompt: EncodedPrompt) -> torch.Tensor:
    """Image tokens (9) share a place in time, and the text goes on after them; [3, P]."""
    return torch.tensor({4: [[0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 2, 3]], 3: [[0, 1, 2]] * 3}[len(prompt.token_ids)])


def test_a_batch_by_hand():
    first = TrainingSample(prompt("a"), PROMPTS["a"], [11, 12], [-0.1, -0.2], 1.5, 0.25, 0)
    second = TrainingSample(prompt("b"), PROMPTS["b"], [13, 14, 15, 16], [-0.3, -0.4, -0.5, -0.6], -0.5, 0.125, 0)
    third = TrainingSample(prompt("a"), PROMPTS["a"], [17], [-0.7], 0.0, 0.5, 1)
    encoder = Encoder()
    batch = collate([first, second, third], encoder, positions)
    # Prompt b, which is shorter, prompt a, then their completions, the shorter first, without their last tokens:
    # those of the second; nothing of the third; those of the first.
    assert batch.input_ids.tolist() == [[1, 9, 3, 1, 9, 9, 2, 13, 14, 15, 11]]
    # Completions of b go on after place 2, those of a after place 3.
    assert batch.position_ids[:, 0].tolist() == [
        [0, 1, 2, 0, 1, 1, 2, 3, 4, 5, 4],
        [0, 1, 2, 0, 1, 1, 2, 3, 4, 5, 4],
        [0, 1, 2, 0, 1, 2, 3, 3, 4, 5, 4],
    ]
    assert batch.layout.segments == ((3, 3), (4, 4), (3, 6), (1, 5))
    assert batch.layout.key_rows[7:].tolist() == [0, 1, 2, 7, 8, 9, 3, 4, 5, 6, 10]
    # The prompt's last token predicts the first token of each of its completions.
    assert batch.completion_ids.tolist() == [13, 14, 15, 16, 17, 11, 12]
    assert batch.predictor_index.tolist() == [2, 7, 8, 9, 6, 6, 10]
    assert batch.generator_logprobs.tolist() == pytest.approx([-0.3, -0.4, -0.5, -0.6, -0.7, -0.1, -0.2])
    assert batch.advantages.tolist() == [-0.5] * 4 + [0.0] + [1.5] * 2
    assert batch.weights.tolist() == [0.125] * 4 + [0.5] + [0.25] * 2
    assert batch.completions == (second, third, first)
    assert batch.to(torch.device("cpu")).completions == batch.completions
    # Images once a prompt, in the order of the prompts: b, a.
    assert batch.pixel_values[:, 0].tolist() == [1, 0, 0]
    assert batch.image_grid_thw.tolist() == [[1, 1, 1], [1, 1, 2]]
    assert encoder.asked == ["a", "b"], "each prompt is encoded once"


def test_the_dtypes_are_as_documented():
    algorithm = load_algorithm(load_config("digits", []))
    batch = collate(algorithm.samples([group("a", 2, 5)], [[1.0, -1.0]]), Encoder(), positions)
    whole = (batch.input_ids, batch.position_ids, batch.image_grid_thw, batch.predictor_index, batch.completion_ids)
    assert {tensor.dtype for tensor in whole} == {torch.int64}
    real = (batch.pixel_values, batch.generator_logprobs, batch.advantages, batch.weights)
    assert {tensor.dtype for tensor in real} == {torch.float32}
    assert batch.input_ids.shape == (1, 4 + 1 + 4)
    assert batch.position_ids.shape == (3, 1, 4 + 1 + 4)


@pytest.mark.parametrize(
    ("seen", "counts"),
    [([1, 9, 9, 9, 2], "into 4 tokens, the generator saw 5"), ([1, 9, 9, 3], "into 4 tokens, the generator saw 4")],
)
def test_other_prompt_tokens_than_the_generator_s_are_refused(seen, counts):
    right = TrainingSample(prompt("a"), PROMPTS["a"], [11], [-0.1], 1.0, 1.0, 0)
    odd = replace(right, prompt_token_ids=seen)
    for given in ([odd], [right, odd]):
        with pytest.raises(ValueError, match=f"a: the learner encodes the prompt {counts}"):
            collate(given, Encoder(), positions)


def seen(name: str, image: bytes, text: str = "Which?") -> Prompt:
    return replace(prompt(name), image=image, text=text)
