"""The features of images are the mean of what transformers' own model gives its language model, in each family."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.model.tower import VisionTower


def picture(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_in_bf16_the_rotary_frequencies_stay_exact(tmp_path):
    processor = build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 112 * 112)
    build_model(processor.tokenizer).to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tower = VisionTower(str(tmp_path), load_config("digits", ["cluster.dtype=bfloat16"]), threads=1)
    visual = tower._model.model.model.visual
    assert {buffer.dtype for name, buffer in visual.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert {parameter.dtype for parameter in visual.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_features_are_the_mean_of_the_image_s_tokens(family, tmp_path, monkeypatch):
    processor = build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 112 * 112, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(processor.tokenizer, family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    changes = ["model.min_image_tokens=1", "model.max_image_tokens=15", "cluster.device=cpu", "cluster.dtype=float32"]
    config = load_config("digits", changes)
    tower, images = VisionTower(str(tmp_path), config, threads=1), [picture(160, 96, 0), picture(96, 160, 1)]
    rows = [tower.features(image) for image in images]

    import transformers  # after those modules, which leave out parts of it that take long

    plain = getattr(transformers, family.model_class).from_pretrained(tmp_path, dtype=torch.float32)
    encoder = PromptEncoder(str(tmp_path), config.model)
    for image, row in zip(images, rows, strict=True):
        encoded = encoder.encode("Which?", image)
        tokens = plain.model.get_image_features(encoded.pixel_values, encoded.image_grid_thw).pooler_output[0]
        assert len(tokens) > 1 and row.dtype == np.float32
        np.testing.assert_allclose(row, tokens.detach().mean(0).numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    assert np.array_equal(tower.features(images[0]), rows[0])

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(tower._model, "image_features", full)
    with pytest.raises(UserError, match=r"^the vision tower is out of memory \(CUDA out of memory\.\)$"):
        tower.features(images[0])
