"""One file a family, and named errors for those that are not there."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rft_cluster.common.errors import UserError
from rft_cluster.common.hardware import hardware
from rft_cluster.config import LoraSection, ModelSection
from rft_cluster.model.families.family import LORA_TARGETS, Family
from rft_cluster.model.families.known import FAMILIES, NOT_YET, family_of
from rft_cluster.model.folder import check_model_folder, read_family
from rft_cluster.model.policy import load_policy, load_reference
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.weights.source import PolicyWeights


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family: Family) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model(build_processor(["rose"], ["group"], "Which?", 3136, family).tokenizer, family)


@pytest.fixture(scope="module")
def folder(family: Family, model: PreTrainedModel, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(family.model_type)
    build_processor(["rose"], ["group"], "Which?", 3136, family).save_pretrained(path)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("model_type", [*NOT_YET, "llava", None, 7, ["qwen2_vl"], "qwen2_vl\n"])
def test_a_family_that_is_not_there_is_named(model_type):
    with pytest.raises(UserError) as caught:
        family_of(model_type, "models/mine")
    message = str(caught.value)
    assert message.startswith(f"model.path: models/mine is a {model_type!r}, which is not supported")
    assert all(f"{family.name} ({name!r})" in message for name, family in FAMILIES.items())
    assert ("a recurrence" in message) == (model_type == "qwen3_5")


def test_a_family_is_transformers_own(family, model):
    assert family_of(model.config.model_type, "") is family
    assert type(model).__name__ == family.model_class and type(model.config).__name__ == family.config_class


def test_adapters_are_for_the_linear_layers_of_the_text_layers_and_no_other(model):
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name for name in linear if re.fullmatch(LORA_TARGETS, name)}
    layers = r"model\.language_model\.layers\."
    assert found == {name for name in linear if re.match(layers, name)}
    assert len(found) == 3 * 7 and len(linear) > len(found) + 3


def test_every_layer_is_gathered_by_itself(family, model):
    """A unit that is missing here would be in memory as a whole during every step."""
    inside = {id(parameter) for unit in family.shard_units(model) for parameter in unit.parameters()}
    root = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
    assert not {name for name in root if re.search(r"\.(layers|blocks|\w+_list)\.\d", name)}


def test_the_folder_s_check_knows_tensors_that_there_are(family, model):
    names = [f".{name}" for name, _ in model.named_parameters()]
    assert all(any(name.endswith(f".{end}") for name in names) for end in family.beside_layers)


def test_a_whole_folder_passes_and_a_damaged_one_is_named(family, model, folder, tmp_path):
    assert check_model_folder(folder, 1024) == model.num_parameters()
    assert read_family(folder) is family
    tensors = load_file(folder / "model.safetensors")
    for lost in (
        *family.beside_layers,
        "visual.blocks.1.attn.qkv.weight",
        "layers.2.mlp.up_proj.weight",
    ):
        damaged = tmp_path / lost
        damaged.mkdir()
        (damaged / "config.json").write_bytes((folder / "config.json").read_bytes())
        kept = {name: tensor for name, tensor in tensors.items() if not f".{name}".endswith(f".{lost}")}
        save_file(kept, damaged / "model.safetensors")
        with pytest.raises(UserError, match="lacks weights"):
            check_model_folder(damaged, 1024)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("vision_config", "patch_size", 15),
        ("vision_config", "depth", -1),
        ("text_config", "vocab_size", 100_000),
    ],
)
def test_numbers_of_a_configuration_are_checked(folder, tmp_path, section, key, value):
    config = json.loads((folder / "config.json").read_text())
    config[section][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=rf"{key}|100000 tokens"):
        check_model_folder(tmp_path, 1024)


def test_adapters_are_trained_and_merged_for_the_wire(folder):
    lora = ModelSection(path=str(folder), lora=LoraSection(rank=2))
    policy = load_policy(str(folder), lora, hardware("cpu").attention, [], 1.0)
    layers = [f"model.language_model.layers.{number}." for number in range(3)]
    linear = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    named = {layer + name for layer in layers for name in linear}
    assert {name for name, module in policy.model.named_modules() if isinstance(module, LoraLayer)} == named
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{matrix}.default.weight" for name in named for matrix in "AB"}
    base = load_reference(str(folder), lora, hardware("cpu").attention, [], 1.0).model
    assert [info.name for info in PolicyWeights(policy).metadata()] == [name for name, _ in base.named_parameters()]
