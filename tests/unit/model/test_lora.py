"""LoRA: what goes onto the wire is the merged model, and the base is still there without a copy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from some_prompt import some_prompt

from benchmarks.plain_forward import plain_logprobs
from rft_cluster.common.errors import UserError
from rft_cluster.common.hardware import hardware
from rft_cluster.config import LoraSection, ModelSection
from rft_cluster.learner.collate import collate
from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.model.encoder import EncodedPrompt
from rft_cluster.model.policy import PolicyModel, base_model, load_policy, load_reference
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.weights.source import PolicyWeights

PLAIN = {"text_config": "sdpa", "vision_config": "sdpa"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path: Path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    processor = build_processor(["rose", "lily"], ["group"], "What is it?", 3136)
    build_model(processor.tokenizer).to(torch.bfloat16).save_pretrained(path)
    return str(path)


def model(lora: bool = True) -> ModelSection:
    return ModelSection(path="base", lora=LoraSection(rank=4, alpha=8) if lora else None)


@pytest.fixture
def adapted(folder: str) -> PolicyModel:
    policy = load_policy(folder, model(), PLAIN, [], 1.0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # they start at 0, where an adapter does nothing
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return policy


def logits(policy: PolicyModel) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.arange(20, 30)[None]).logits.float()


def test_a_sliding_window_is_refused(folder: str, tmp_path: Path):
    config = json.loads((Path(folder) / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    config["text_config"].pop("layer_types")
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="use_sliding_window"):
        load_policy(str(tmp_path / "model"), model(), PLAIN, [], 1.0)


def test_only_the_language_model_s_adapters_are_trained_in_fp32(adapted: PolicyModel):
    trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 7 * 2  # layers, linear layers in each, two matrices for each
    assert all(".lora_" in name and "language_model" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_the_wire_has_the_base_s_names_and_the_merged_weights(folder: str, adapted: PolicyModel):
    base = dict(load_reference(folder, model(lora=False), PLAIN, [], 1.0).model.named_parameters())
    wire = dict(PolicyWeights(adapted))
    assert list(wire) == list(base)
    assert [(info.name, info.shape) for info in PolicyWeights(adapted).metadata()] == [
        (name, tuple(parameter.shape)) for name, parameter in base.items()
    ]
    name = "model.language_model.layers.1.mlp.up_proj"
    layer = adapted.model.get_submodule(name)
    update = 8 / 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert torch.equal(wire[f"{name}.weight"], (base[f"{name}.weight"].float() + update).to(torch.bfloat16))
    assert not torch.equal(wire[f"{name}.weight"], base[f"{name}.weight"])
    untouched = "model.visual.blocks.0.attn.qkv.weight"
    assert torch.equal(wire[untouched], base[untouched])


def test_the_merged_model_computes_what_the_adapted_one_does(folder: str, adapted: PolicyModel):
    merged = load_reference(folder, model(lora=False), PLAIN, [], 1.0)
    merged.model.load_state_dict(dict(PolicyWeights(adapted)), strict=False)
    difference = (logits(merged) - logits(adapted)).abs().mean()
    changed = (logits(load_reference(folder, model(lora=False), PLAIN, [], 1.0)) - logits(adapted)).abs().mean()
    assert difference < 0.1 * changed, "BF16 rounding of merged weights, far below the adapters' effect"


def test_the_base_is_the_starting_model_and_the_adapters_come_back(folder: str, adapted: PolicyModel):
    before = logits(adapted)
    with base_model(adapted) as base:
        assert torch.equal(logits(base), logits(load_reference(folder, model(lora=False), PLAIN, [], 1.0)))
    assert torch.equal(logits(adapted), before)
    with pytest.raises(MemoryError), base_model(adapted):
        raise MemoryError
    assert torch.equal(logits(adapted), before), "also after an error: the learner may be used again"


class Encoder:
    """An image of 2 x 2 tokens between three words."""

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        pixels = torch.randn(16, 1176, generator=torch.Generator().manual_seed(2))
        return EncodedPrompt([1, 20, 3, 6, 6, 6, 6, 4, 21, 22], pixels, torch.tensor([[1, 4, 4]]))


def test_adapters_and_their_base_share_a_prefix_as_any_model(adapted: PolicyModel):
    policy = adapted.float()  # so that only the way of computing could differ
    asked = some_prompt("train/0/0", "photos/a.png", b"", "Which?", "rose", 0)
    tokens = Encoder().encode(asked).token_ids
    samples = [TrainingSample(asked, tokens, [30 + n] * n, [-1.0] * n, 1.0, 0.5, 0) for n in (1, 3, 4)]
    batch = collate(samples, Encoder(), policy.prompt_positions)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        policy.model.set_attn_implementation(PLAIN)
        plain = torch.cat(plain_logprobs(policy.model, samples, Encoder(), [], 1.0))
        policy.model.set_attn_implementation(hardware("cpu").attention)
        return policy(**batch.inputs())[0], plain

    found, expected = both()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    names, trained = zip(*((n, p) for n, p in policy.named_parameters() if p.requires_grad), strict=True)
    for name, ours, theirs in zip(
        names, torch.autograd.grad(found.sum(), trained), torch.autograd.grad(expected.sum(), trained), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
    with base_model(policy), torch.no_grad():
        base, base_expected = both()
    torch.testing.assert_close(base, base_expected, rtol=0, atol=1e-5)
    assert (base - found).abs().max() > 0.01
