import json
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.model.qwen2vl import check_model_folder


def write_folder(folder: Path, config: dict | str | bytes | None, *files: str) -> str:
    folder.mkdir(exist_ok=True)
    if isinstance(config, bytes):
        (folder / "config.json").write_bytes(config)
    elif config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files:
        (folder / name).write_bytes(b"")
    return str(folder)


QWEN = {"model_type": "qwen2_vl", "max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (None, [], "holds no config.json, so it is not a model folder"),
        ("{", [], "config.json is not JSON"),
        (b"\xff{}", [], "config.json is not JSON"),
        ("[]", ["model.safetensors"], "config.json holds a list, not an object"),
        ("null", ["model.safetensors"], "config.json holds a NoneType, not an object"),
        ({"model_type": "llama"}, ["model.safetensors"], "is a 'llama', but only 'qwen2_vl' is supported"),
        ({"model_type": "qwen2_5_vl"}, ["model.safetensors"], "is a 'qwen2_5_vl', but only 'qwen2_vl' is supported"),
        ({}, ["model.safetensors"], "is a None, but only 'qwen2_vl' is supported"),
        (QWEN, [], "holds no .safetensors file"),
        (QWEN, ["pytorch_model.bin"], "holds no .safetensors file"),
        ({**QWEN, "max_position_embeddings": 1023}, ["model.safetensors"], "= 1024 is more than the window of"),
        (
            {"model_type": "qwen2_vl", "text_config": {"max_position_embeddings": 512}},
            ["model.safetensors"],
            "512 tokens: lower one of them",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, config, files, message):
    path = write_folder(tmp_path / "model", config, *files)
    with pytest.raises(UserError) as caught:
        check_model_folder(path, longest_sequence=1024)
    assert message in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such", "../no", "~/no/such/folder"])
def test_a_path_that_does_not_exist_is_refused(path):
    with pytest.raises(UserError, match=f"there is no folder {path}"):
        check_model_folder(path, 1024)


@pytest.mark.parametrize(
    "config",
    [
        {**QWEN, "max_position_embeddings": 1024},
        {"model_type": "qwen2_vl", "text_config": {}},
        {**QWEN, "text_config": None},
    ],
)
def test_a_model_folder_passes(tmp_path, config):
    check_model_folder(write_folder(tmp_path / "model", config, "model-00001-of-00002.safetensors"), 1024)


def test_a_hub_name_passes_unread():
    check_model_folder("Qwen/Qwen2-VL-2B-Instruct", 10**9)
