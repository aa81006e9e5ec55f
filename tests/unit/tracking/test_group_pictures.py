import io

import numpy as np
import pytest
from PIL import Image, ImageColor

from rft_cluster.tracking.pictures import BAD, FAINT, GOOD, IMAGE, LETTERS, MARGIN, MOST_LINES, draw_group, shortened
from tests.unit.run.begun import picture


def row(advantages: list[float | None], text: str = "<answer>rose</answer>") -> dict:
    rewards = [{"total": None if one is None else 1.0} for one in advantages]
    return {
        "example_id": "a",
        "label": "rose",
        "completions": [text] * len(advantages),
        "rewards": rewards,
        "advantages": advantages,
    }


def drawn(image: bytes | None, row: dict) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(draw_group(image, row))))


def has(pixels: np.ndarray, colour: str) -> bool:
    return bool((pixels == ImageColor.getrgb(colour)).all(axis=-1).any())


def test_the_image_is_on_the_left_and_good_and_bad_completions_are_told_apart():
    pixels = drawn(picture("red"), row([-0.7, 0.7]))
    assert (pixels[MARGIN : MARGIN + IMAGE, MARGIN : MARGIN + IMAGE] == (255, 0, 0)).all()
    assert has(pixels, GOOD) and has(pixels, BAD) and not has(pixels, FAINT)
    equal = drawn(picture("red"), row([0.0, 0.0, None]))
    assert has(equal, FAINT) and not has(equal, GOOD) and not has(equal, BAD)


def test_without_the_image_the_completions_are_still_there():
    assert has(drawn(None, row([-0.7, 0.7])), GOOD)


@pytest.mark.parametrize("text", ["", "\x1b[2J\u202e‮", "\ud800", "東京 🌹", "x" * 100_000, "a\nb\x00"])
def test_any_text_can_be_drawn(text):
    many = drawn(picture("red"), row([1.0] * 1000, text))
    assert many.shape[0] == 2 * MARGIN + 18 * (MOST_LINES + 1)


def test_of_a_long_text_the_beginning_and_the_end_are_shown():
    text = "<think>" + "x" * 500 + "</think><answer>rose</answer>"
    assert len(shortened(text)) == LETTERS
    assert shortened(text).startswith("<think>x") and shortened(text).endswith("<answer>rose</answer>")
    assert shortened("x" * LETTERS) == "x" * LETTERS
