"""An image encoder in a folder gives the vectors of transformers' own classes, and no code of the folder is run."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.model.folder import check_encoder
from rft_cluster.model.image_encoder import ImageEncoder

CONFIG = load_config("digits", ["cluster.dtype=float32"])
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 8, "max_position_embeddings": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def saved(folder: Path, kind: str) -> str:
    """A small encoder with random weights, as transformers saves it."""
    import transformers as tf

    vision = {**SMALL, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match kind:
            case "siglip":
                model = tf.SiglipModel(tf.SiglipConfig(text_config=TEXT, vision_config=vision))
                processor = tf.SiglipImageProcessor(size={"height": 28, "width": 28})
            case "siglip2":  # NaFlex: as many patches as the picture's shape gives; other SigLIP2 are of class Siglip
                sized = {**SMALL, "patch_size": 14, "num_patches": 4}
                model = tf.Siglip2Model(tf.Siglip2Config(text_config=TEXT, vision_config=sized))
                processor = tf.Siglip2ImageProcessor(patch_size=14, max_num_patches=4)
            case "dinov3":
                model = tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**vision))
                processor = tf.DINOv3ViTImageProcessor(size={"height": 28, "width": 28})
            case "dinov2":
                model = tf.Dinov2Model(tf.Dinov2Config(**{**vision, "mlp_ratio": 1}))
                processor = tf.BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
            case "without a head":
                model = tf.ViTModel(tf.ViTConfig(**vision), add_pooling_layer=False)
                processor = tf.ViTImageProcessor(size={"height": 28, "width": 28})
            case "text":
                model = tf.BertModel(tf.BertConfig(**TEXT))
                processor = tf.ViTImageProcessor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "dinov2", "dinov3", "without a head"])
def test_vectors_are_those_of_transformers(kind, tmp_path):
    path = saved(tmp_path, kind)
    check_encoder(tmp_path)
    encoder = ImageEncoder(path, CONFIG, threads=1)
    rows = [encoder.features(picture(seed)) for seed in (0, 1)]
    import transformers as tf

    others = {"siglip": tf.SiglipVisionModel, "siglip2": tf.Siglip2VisionModel, "without a head": tf.ViTModel}
    loaded = others | {"dinov2": tf.Dinov2Model, "dinov3": tf.DINOv3ViTModel}
    plain = loaded[kind].from_pretrained(path).eval()
    processor = tf.AutoImageProcessor.from_pretrained(path)
    for seed, row in enumerate(rows):
        inputs = processor(images=Image.open(io.BytesIO(picture(seed))), return_tensors="pt")
        with torch.no_grad():
            found = plain(**inputs)
        pooled = found.last_hidden_state.mean(1) if kind == "without a head" else found.pooler_output
        assert (row.dtype, row.shape) == (np.float32, (16,))
        np.testing.assert_allclose(row, pooled[0].numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


@pytest.mark.parametrize("how", ["text", "pickled", "own code", "unknown", "half"])
def test_what_is_no_encoder_or_would_run_code_is_refused(how, tmp_path):
    path = saved(tmp_path, "text" if how == "text" else "dinov2")
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    match how:
        case "pickled":
            (tmp_path / "model.safetensors").unlink()
            torch.save({}, tmp_path / "pytorch_model.bin")
            with pytest.raises(UserError, match=r"has no \*.safetensors: name the folder"):
                check_encoder(tmp_path)
        case "own code":
            settings |= {"auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}, "model_type": "mine"}
            (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        case "half":
            tensors = load_file(tmp_path / "model.safetensors")
            save_file(dict(list(tensors.items())[:5]), tmp_path / "model.safetensors", {"format": "pt"})
        case "unknown":
            settings["model_type"] = "nothing_known"
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"^evaluation.encoder: {path} "):
        ImageEncoder(path, CONFIG, threads=1)
    assert not (tmp_path / "ran").exists()
