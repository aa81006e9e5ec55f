"""The unlabelled pool of the small model: which images, how large, and what is said of it."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.data.lazy import Pool
from rft_cluster.prompts import Question
from rft_cluster.run.task import MAX_POOL, Task, choose_pool, pool_images, pool_note


def encoded(side: int, number: int = 0, file_format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side, side)).save(file, file_format)
    return file.getvalue()


def test_the_pool_is_chosen_before_anything_is_read():
    assert choose_pool(MAX_POOL, 0) == list(range(MAX_POOL))
    chosen = choose_pool(3 * MAX_POOL, 1)
    assert len(set(chosen)) == MAX_POOL and chosen == sorted(chosen) and max(chosen) < 3 * MAX_POOL
    assert chosen == choose_pool(3 * MAX_POOL, 1) != choose_pool(3 * MAX_POOL, 2)


@pytest.mark.parametrize("side", [20, 56, 57, 300, 1500])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_each_image_is_read_when_it_is_needed_and_kept_small(side, file_format):
    read = []

    def file(number: int) -> bytes:
        read.append(number)
        return encoded(side, number, file_format)

    images = pool_images(Pool(range(9), file), [1, 4, 7], 56 * 56)
    assert read == [1, 4, 7]
    assert {image.size for image in images} == {(min(side, 56), min(side, 56))}


@pytest.mark.parametrize("bad", [b"", b"text", encoded(99)[:200], b"\x89PNG\r\n\x1a\n"])
def test_what_cannot_be_read_is_left_out_and_counted(capsys, bad):
    images = pool_images([encoded(60), bad, encoded(60, 1), bad], [0, 1, 2, 3], 3136)
    assert len(images) == 2
    assert capsys.readouterr().out == "left out 2 of 4 unlabelled images, which cannot be read\n"


@pytest.mark.parametrize(("pool", "held_out"), [(10, 500), (39, 500), (39, 0), (40, 500), (1097, 700)])
def test_the_size_of_the_pool_is_said_and_a_small_one_warned_of(pool, held_out):
    examples = [LabelledImage(str(i), b"", "ab"[i % 2]) for i in range(8 + held_out)]
    dataset = FewShotDataset.of("toy", ["a", "b"], examples[:8], [], examples[8:], [b""] * pool)
    config: Config = load_config("digits", [])
    (note,) = pool_note(config, Task(dataset, Question("")))
    assert f"a pool of {pool} unlabelled images" in note
    assert ("it will see little" in note) == (pool < 40)
    assert (f"which hold out {held_out}" in note) == (pool < 40 and held_out > 0)
    other = config.model_copy(update={"model": config.model.model_copy(update={"path": "Qwen/Qwen2-VL-2B-Instruct"})})
    assert pool_note(other, Task(replace(dataset), Question(""))) == []
