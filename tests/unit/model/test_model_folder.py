"""A model folder that is not whole: every damage to every file is named, before or after heavy imports."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rft_cluster.common.errors import UserError
from rft_cluster.config import ModelSection
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.folder import INDEX, WEIGHTS, check_model_folder, check_parallel
from rft_cluster.model.tiny.build import untrained
from rft_cluster.prompts import Question

PIXELS = 56 * 56
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja")
DAMAGES = {
    "gone": lambda data: None,
    "empty": lambda data: b"",
    "first half": lambda data: data[: len(data) // 2],
    "all but the end": lambda data: data[:-2],
    "no UTF-8": lambda data: b"\xff\xfe" + data,
    "zeros": lambda data: bytes(len(data)),
    "a list": lambda data: b"[]",
    "a number": lambda data: b"7",
    "an empty object": lambda data: b"{}",
    "deep": lambda data: b"[" * 100_000,
    "a page of the web": lambda data: b"<html><body>404</body></html>",
    "a pointer of Git LFS": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    processor, model = untrained(40, ["rose", "tulip"], Question("What is it?"), PIXELS)
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def check(folder: Path) -> int:
    parameters = check_model_folder(folder, 1024)
    PromptEncoder(str(folder), ModelSection(path=str(folder), min_pixels=PIXELS, max_pixels=PIXELS))
    return parameters


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).startswith("model.")
    return str(caught.value)


def split(folder: Path, parts: int = 2) -> dict[str, str]:
    """The weights in several files with an index, as large models have them. Returns where each tensor lies."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-{n % parts + 1:05d}-of-{parts:05d}.safetensors" for n, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    write_index(folder, places)
    return places


def write_index(folder: Path, places: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_another_model_s_image_processor_is_named(copy):
    file = copy / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_processor_type"] = "CLIPImageProcessor"
    file.write_text(json.dumps(config))
    assert "is a CLIPImageProcessor" in refusal(copy)


def test_a_whole_one_passes(copy):
    parameters = check(copy)
    split(copy)
    assert check(copy) == parameters > 10**6


@pytest.mark.parametrize(("file", "damage"), itertools.product(NEEDED, DAMAGES))
def test_a_damaged_file_is_named(copy, file, damage):
    data = DAMAGES[damage]((copy / file).read_bytes())
    (copy / file).unlink()
    if data is not None:
        (copy / file).write_bytes(data)
    refusal(copy)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", [1, 2, INDEX])
def test_a_damaged_part_is_named(copy, part, damage):
    split(copy)
    file = copy / (INDEX if part == INDEX else f"model-{part:05d}-of-00002.safetensors")
    data = DAMAGES[damage](file.read_bytes())
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    assert file.name in refusal(copy)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], "holds no weight_map"),
        ({}, "holds no weight_map"),
        ({"a": 3}, "names 3"),
        ({"a": "../outside.safetensors"}, "names '../outside.safetensors'"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"a": "gone.safetensors"}, "lacks gone.safetensors"),
        ({"nowhere": "model-00001-of-00002.safetensors"}, "1 tensors are not where"),
    ],
)
def test_an_index_that_does_not_fit(copy, places, message):
    split(copy)
    write_index(copy, places)
    assert message in refusal(copy)


def test_every_tensor_that_is_missing_is_named(copy):
    tensors = load_file(copy / WEIGHTS)
    layers = [name for name in tensors if ".layers." in name or ".blocks." in name]
    beside = [name for name in tensors if name.endswith(("embed_tokens.weight", "model.norm.weight", "proj.weight"))]
    for name in [*layers, *(set(beside) - set(layers))]:
        save_file({other: value for other, value in tensors.items() if other != name}, copy / WEIGHTS)
        assert "lacks weights" in refusal(copy), name


@pytest.mark.parametrize("kind", ["layers", "blocks"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_layer_that_is_missing_is_named(copy, kind, number):
    tensors = load_file(copy / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if f".{kind}.{number}." not in name}, copy / WEIGHTS)
    assert f"{kind}.{number}" in refusal(copy)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float64])
def test_weights_that_cannot_be_trained(copy, dtype):
    tensors = load_file(copy / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].astype(dtype)}, copy / WEIGHTS)
    assert "cannot be trained" in refusal(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "is a 'llama', which is not supported: take Qwen2-VL ('qwen2_vl')"),
        ({"model_type": None}, "is a None"),
        ({"text_config": {"use_sliding_window": True, "max_window_layers": 0}}, "has use_sliding_window set"),
        ({"text_config": {"layer_types": ["full_attention", "sliding_attention"]}}, "has use_sliding_window set"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
        ({"text_config": {"max_position_embeddings": 1023}}, "= 1024 is more than the window"),
        (
            {"text_config": {"vocab_size": 2_000_000_000}},
            "vocab_size: Input should be less than or equal to 2000000",
        ),
        ({"text_config": {"hidden_size": 64}}, "of width 64"),
        ({"text_config": {"num_hidden_layers": 28}}, "lacks weights: layers.3, layers.4, layers.5 and 22 more"),
        ({"vision_config": {"depth": 32}}, "lacks weights: blocks.3"),
    ],
)
@pytest.mark.parametrize("flat", [False, True], ids=["in sections", "as older ones are"])
def test_a_configuration_that_does_not_fit_the_weights(copy, change, message, flat):
    file = copy / "config.json"
    config = json.loads(file.read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if key in ("text_config", "vision_config") else value
    if flat:
        config |= config.pop("text_config") | {"model_type": config["model_type"]}
    file.write_text(json.dumps(config))
    assert message in refusal(copy)


def test_pickled_weights_are_not_loaded(copy):
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    assert "pickled weights are not loaded" in refusal(copy)


def test_files_without_an_index(copy):
    (copy / WEIGHTS).rename(copy / "weights.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(copy)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_tokenizer_of_another_model(copy, token):
    file = copy / "tokenizer.json"
    file.write_text(file.read_text().replace(token, token.replace("|", "!")))
    for other in ("tokenizer_config.json", "chat_template.jinja"):
        (copy / other).write_text((copy / other).read_text().replace(token, token.replace("|", "!")))
    refusal(copy)


@pytest.mark.parametrize("template", ["", "{{ messages }", "{{ raise_exception('no') }}", "{{ nope.x.y }}", "hello"])
def test_a_chat_template_that_cannot_be_used(copy, template):
    (copy / "chat_template.jinja").write_text(template)
    assert "chat template" in refusal(copy)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("gpus", range(1, 9))
def test_an_engine_over_several_gpus_divides_the_heads(gpus, flat):
    text = {"num_attention_heads": 12}
    config = text if flat else {"text_config": text}
    if 12 % gpus == 0:
        check_parallel(config, gpus)
    else:
        with pytest.raises(UserError, match=f"generators.gpus is {gpus}, .* be divided over 1, 2, 3, 4, 6, 12 GPUs"):
            check_parallel(config, gpus)
