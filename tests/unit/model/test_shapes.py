"""The sizes of models, and the bytes that autograd keeps, counted against real layers of small widths."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Qwen2VLConfig

from rft_cluster.common.hardware import hardware
from rft_cluster.model import shared_prefix
from rft_cluster.model.families.family import LORA_TARGETS
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.shapes import FP32, Shapes

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
FILE = Path("config.json")
PUBLISHED = json.loads((BENCHMARKS / "qwen2_vl_2b.json").read_text())
SHAPES_2B = Shapes.of(PUBLISHED["config"], FILE)


def published(name: str) -> int:
    """The number of elements of a published tensor."""
    return torch.Size(PUBLISHED["tensors"][name]).numel()


def test_the_2b_s_parameters_are_those_of_its_published_tensors():
    text = sum(published(name) for name in PUBLISHED["tensors"] if name.startswith("model.layers."))
    vision = sum(published(name) for name in PUBLISHED["tensors"] if name.startswith("visual.blocks."))
    assert (SHAPES_2B.text_layer, SHAPES_2B.vision_layer) == (text, vision) == (46_797_824, 19_677_440)
    assert SHAPES_2B.merger == sum(published(name) for name in PUBLISHED["tensors"] if "merger" in name)
    assert SHAPES_2B.patch_embedding == published("visual.patch_embed.proj.weight")
    assert SHAPES_2B.parameters == 2_208_985_600
    assert SHAPES_2B.tensors == 729


def test_the_sizes_of_qwen2_5_vl_3b_are_those_of_its_class():
    config = json.loads((BENCHMARKS / "qwen2_5_vl_3b.json").read_text())["config"]
    shapes = Shapes.of(config, FILE)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**config))
    assert shapes.parameters == sum(one.numel() for one in model.parameters()) == 3_754_622_976
    assert shapes.tensors == len(list(model.parameters()))
    assert shapes.text_layer == sum(one.numel() for one in model.model.language_model.layers[0].parameters())
    assert shapes.vision_layer == sum(one.numel() for one in model.model.visual.blocks[0].parameters())
    assert (shapes.windowed_layers, shapes.window) == (28, 64)  # of 32, in windows of 8 x 8 patches


def test_the_sizes_of_qwen3_vl_2b_are_those_of_its_class():
    config = json.loads((BENCHMARKS / "qwen3_vl_2b.json").read_text())["config"]
    shapes = Shapes.of(config, FILE)
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**config))
    visual = model.model.visual
    assert shapes.parameters == sum(one.numel() for one in model.parameters())
    assert shapes.tensors == len(list(model.parameters()))
    assert shapes.text_layer == sum(one.numel() for one in model.model.language_model.layers[0].parameters())
    assert shapes.vision_layer == sum(one.numel() for one in visual.blocks[0].parameters())
    assert shapes.deepstack_merger == sum(one.numel() for one in visual.deepstack_merger_list[0].parameters())
    assert shapes.vision == sum(one.numel() for one in visual.parameters())


def test_windows_leave_out_most_pairs_of_patches():
    whole = replace(SHAPES_2B, windowed_layers=0)
    mostly = replace(SHAPES_2B, windowed_layers=28, window=64)
    pairs = 2048.0**2  # of an image of 512 tokens
    assert whole.vision_flops(2048, pairs) - mostly.vision_flops(2048, pairs) == 28 * 4 * 1280 * (pairs - 2048 * 64)
    assert mostly.vision_flops(16, 256) == whole.vision_flops(16, 256)  # a digit is less than a window


def test_an_untied_head_counts_once_more():
    untied = replace(SHAPES_2B, tied=False)
    assert untied.parameters - SHAPES_2B.parameters == 151_936 * 1536
    assert untied.tensors == 730


def test_adapters_of_rank_64_have_74_million_parameters():
    # q and o [1536, 1536], k and v [256, 1536], gate and up [8960, 1536], down [1536, 8960]
    assert SHAPES_2B.adapters(64) == 28 * 64 * (2 * 3072 + 2 * 1792 + 3 * 10_496) == 73_859_072


def test_old_and_new_forms_of_a_configuration_are_read_alike():
    nested = Qwen2VLConfig(**PUBLISHED["config"]).to_dict()
    assert "text_config" in nested and Shapes.of(nested, FILE) == SHAPES_2B


def test_the_bytes_that_a_token_and_a_patch_of_the_2b_keep():
    """Measured before this was written, with an attention that keeps what torch's variable-length operator does."""
    assert SHAPES_2B.kept_text(2) == 102_456 and SHAPES_2B.kept_key(2) == 1024
    assert SHAPES_2B.kept_vision(2) == 58_952


def test_flops_of_a_forward_by_hand():
    # a token: 2 FLOPs a weight of 28 layers; a pair: a product of 1536 for its score, and one for its value
    assert SHAPES_2B.text_flops(1, 0) == 2 * 28 * 46_797_824
    assert SHAPES_2B.text_flops(0, 1) == 28 * 4 * 1536
    assert SHAPES_2B.vision_flops(4, 0) == 4 * (32 * 2 * 19_677_440 + 2 * 1_505_280) + 2 * 34_087_936
    assert SHAPES_2B.head_flops(1) == 2 * 151_936 * 1536


# Counted on real layers

PROMPT, COMPLETIONS, LENGTH, GRID = 24, 3, 9, (4, 8)
TOKENS, PATCHES = PROMPT + COMPLETIONS * (LENGTH - 1), GRID[0] * GRID[1]
KEYS = PROMPT + COMPLETIONS * (PROMPT + LENGTH - 1)
IMAGE = 6  # the image token's id
MASK = (LENGTH - 1) * (PROMPT + LENGTH - 1) * FP32  # SDPA's, of one completion


QWEN2 = {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
QWEN2_5 = {"hidden_size": 48, "out_hidden_size": 64, "intermediate_size": 40, "fullatt_block_indexes": [0]}


QWEN3 = {"hidden_size": 48, "out_hidden_size": 64, "intermediate_size": 96}
QWEN3 |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
VISION = {"qwen2_vl": QWEN2, "qwen2_5_vl": QWEN2_5, "qwen3_vl": QWEN3}


def small(
    layers: int, blocks: int, dtype: torch.dtype, lora: bool, again: bool, family: str
) -> tuple[PolicyModel, Shapes]:
    text = {
        **{"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"] * layers},
        **{"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
        **{"bos_token_id": 1, "eos_token_id": 2},
    }
    vision = {"depth": blocks, "num_heads": 4, **VISION[family]}
    if family == "qwen3_vl":
        text |= {"head_dim": 24}
        text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [4, 4, 4]}
    make_config = getattr(transformers, FAMILIES[family].config_class)
    config = make_config(text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=True)
    attention = hardware("cpu").attention
    model = getattr(transformers, FAMILIES[family].model_class)._from_config(
        config, dtype=dtype, attn_implementation=attention
    )
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=8, target_modules=LORA_TARGETS), model)
        model.to(dtype)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModel(model, [], 1.0).train(), Shapes.of(config.to_dict(), FILE)


def kept_bytes(policy: PolicyModel) -> int:
    """Bytes of all tensors that one forward keeps for the backward, each storage once, without parameters."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other gets its address
        return tensor

    prompt = [1, 1, *[IMAGE] * (PATCHES // 4)]
    prompt += [2] * (PROMPT - len(prompt))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(
            input_ids=torch.tensor([prompt + [3] * (TOKENS - PROMPT)]),
            position_ids=torch.arange(TOKENS).expand(3, 1, TOKENS),
            layout=shared_prefix.pack_layout([PROMPT], [LENGTH - 1] * COMPLETIONS, [0] * COMPLETIONS),
            pixel_values=torch.ones(PATCHES, 3 * 2 * policy.model.config.vision_config.patch_size**2),
            image_grid_thw=torch.tensor([[1, *GRID]]),
            predictor_index=torch.arange(COMPLETIONS * LENGTH),
            completion_ids=torch.ones(COMPLETIONS * LENGTH, dtype=torch.int64),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def of_a_layer(
    dtype: torch.dtype, lora: bool = False, again: bool = False, family: str = "qwen2_vl"
) -> tuple[int, int, Shapes]:
    """Bytes kept by a text layer and by a vision layer: what a second one adds."""
    how = (dtype, lora, again, family)
    one, shapes = small(2, 2, *how)
    text, vision = small(3, 2, *how)[0], small(2, 3, *how)[0]
    first = kept_bytes(one)
    return kept_bytes(text) - first, kept_bytes(vision) - first, shapes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_formulas_count_what_layers_keep_with_sdpa(dtype, size, family):
    text, vision, shapes = of_a_layer(dtype, family=family)
    assert text == (shapes.kept_text(size) + shapes.kept_text_sdpa(size)) * TOKENS + shapes.kept_key(FP32) * KEYS + MASK
    assert vision == shapes.kept_vision(size) * PATCHES


class Variable(torch.autograd.Function):
    """Keeps what the backward of torch's variable-length operator is given (`torch.nn.attention.varlen`)."""

    @staticmethod
    def forward(context, query, key, value):
        output = torch.zeros_like(query)
        context.save_for_backward(query, key, value, output, torch.zeros(query.shape[1], query.shape[0]))
        return output


def variable_segments(query, key, value, layout, scaling):
    key, value = (shared_prefix._gather(rows, layout.key_rows) for rows in (key, value))
    return Variable.apply(query, key, value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_the_formulas_count_what_layers_keep_with_the_variable_length_kernel(monkeypatch, lora, family):
    from transformers import AttentionInterface

    shared_prefix._register("counted", variable_segments)
    monkeypatch.setitem(AttentionInterface._global_mapping, "shared_prefix_sdpa", AttentionInterface()["counted"])
    text, vision, shapes = of_a_layer(torch.bfloat16, lora, family=family)
    assert text == shapes.kept_text(2, rank=8 if lora else 0) * TOKENS + shapes.kept_key(2) * KEYS
    assert vision == (0 if lora else shapes.kept_vision(2) * PATCHES)


def test_with_gradient_checkpointing_a_layer_keeps_its_input():
    text, vision, shapes = of_a_layer(torch.bfloat16, again=True)
    assert (text, vision) == (2 * shapes.hidden * TOKENS, 2 * shapes.vision_hidden * PATCHES)
