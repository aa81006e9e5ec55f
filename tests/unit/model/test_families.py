"""One file a family, and named errors for those that are not there."""

import re

import pytest
import torch
import transformers

from rft_cluster.common.errors import UserError
from rft_cluster.model.families.family import LORA_TARGETS, Family
from rft_cluster.model.families.known import FAMILIES, NOT_YET, family_of
from rft_cluster.model.tiny.build import build_model, build_processor


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family: Family) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return build_model(build_processor(["rose"], ["group"], "Which?", 3136, family).tokenizer, family)


@pytest.mark.parametrize("model_type", [*NOT_YET, "llava", None, 7, ["qwen2_vl"], "qwen2_vl\n"])
def test_a_family_that_is_not_there_is_named(model_type):
    with pytest.raises(UserError) as caught:
        family_of(model_type, "models/mine")
    message = str(caught.value)
    assert message.startswith(f"model.path: models/mine is a {model_type!r}, which is not supported")
    assert all(f"{family.name} ({name!r})" in message for name, family in FAMILIES.items())
    if model_type in ("qwen3_5",):
        assert "a recurrence" in message


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
