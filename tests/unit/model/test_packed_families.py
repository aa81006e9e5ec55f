"""The packed forward of each family equals transformers' plain one, at tiny size in FP32, the vision tower included."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from some_prompt import some_prompt
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from benchmarks.models import spread
from benchmarks.plain_forward import plain_logprobs
from rft_cluster.common.hardware import hardware
from rft_cluster.learner.collate import collate
from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.model.encoder import EncodedPrompt
from rft_cluster.model.families.family import Family
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.shapes import Shapes
from rft_cluster.model.tiny.build import build_model, build_processor

START, END, IMAGE_PAD = 3, 4, 6  # vision_start, vision_end, image_pad of the tiny tokenizer
FORBIDDEN = [3, 4, 5, 6, 7]
TEMPERATURE = 0.7
# Patches of an image's sides, and the lengths of its prompt's completions. 8 patches are a window's side: the first
# image has whole windows alone (224 pixels in Qwen2.5-VL), the next are cut at one edge or at both, the last is less
# than one window.
IMAGES = {(16, 16): [3, 1], (18, 22): [2, 4], (24, 10): [5], (4, 6): [1, 2, 2]}


class Encoder:
    """A prompt's seed says which of `IMAGES` it is about."""

    def __init__(self, values: int) -> None:
        self._values = values  # of a patch

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        height, width = list(IMAGES)[prompt.seed]
        draw = torch.Generator().manual_seed(prompt.seed)
        image = [START, *[IMAGE_PAD] * (height * width // 4), END]
        words = torch.randint(10, 250, (1 + prompt.seed,), generator=draw).tolist()
        pixels = torch.randn(height * width, self._values, generator=draw)
        return EncodedPrompt([1, 20, *image, *words], pixels, torch.tensor([[1, height, width]]))


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def plain(family: Family) -> PreTrainedModel:
    """Random, in FP32, its weights large enough for log-probabilities that differ."""
    processor = build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(build_model(processor.tokenizer, family).float())


@pytest.fixture(scope="module")
def encoder(family: Family) -> Encoder:
    return Encoder(3 * 2 * family.patch**2)


@pytest.fixture(scope="module")
def samples(encoder: Encoder) -> list[TrainingSample]:
    draw = torch.Generator().manual_seed(1)
    prompts = [some_prompt(f"train/0/{i}", "photos/a.png", b"", "Which?", "zero", i) for i in range(len(IMAGES))]
    return [
        TrainingSample(
            asked,
            encoder.encode(asked).token_ids,
            torch.randint(10, 250, (length,), generator=draw).tolist(),
            [-1.0] * length,
            1.0,
            0.5,
            0,
        )
        for asked, lengths in zip(prompts, IMAGES.values(), strict=True)
        for length in lengths
    ]


@pytest.fixture
def policy(plain: PreTrainedModel) -> PolicyModel:
    """The same weights as `plain`."""
    model = copy.deepcopy(plain)
    model.set_attn_implementation(hardware("cpu").attention)
    return PolicyModel(model, FORBIDDEN, TEMPERATURE)


def packed(policy: PolicyModel, samples: list[TrainingSample], encoder: Encoder) -> list[Tensor]:
    """Log-probabilities of each sample's tokens, in the order of `samples`, from one row."""
    numbered = [replace(sample, weight=float(i)) for i, sample in enumerate(samples)]
    batch = collate(numbered, encoder, policy.prompt_positions)
    logprobs, _ = policy(**batch.inputs())
    return [logprobs[batch.weights == i] for i in range(len(samples))]


def gradients(model: PreTrainedModel, logprobs: list[Tensor]) -> dict[str, Tensor]:
    """The gradient of a sum with a different factor for each token."""
    flat = torch.cat(logprobs)
    model.zero_grad()
    (flat * torch.linspace(-1, 2, len(flat))).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def untie(model: PreTrainedModel) -> None:
    """Give the model an output layer of its own, as larger ones have."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())


@pytest.mark.parametrize("case", ["tied", "untied", "gradient checkpointing"])
def test_log_probabilities_and_every_gradient_are_those_of_the_plain_forward(policy, plain, samples, encoder, case):
    if case == "untied":
        plain = copy.deepcopy(plain)
        untie(plain)
        untie(policy.model)
    if case == "gradient checkpointing":
        policy.train().model.gradient_checkpointing_enable({"use_reentrant": False})
    found = packed(policy, samples, encoder)
    expected = plain_logprobs(plain, samples, encoder, FORBIDDEN, TEMPERATURE)
    assert torch.cat(found).std() > 0.5, "a test of equal numbers would be blind"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours, theirs = gradients(policy.model, found), gradients(plain, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.norm() > 0, name
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_patches_are_embedded_as_by_the_convolution(family, policy, plain):
    patches = torch.randn(12, 3 * 2 * family.patch**2, generator=torch.Generator().manual_seed(3))
    embed, convolution = policy.model.model.visual.patch_embed, plain.model.visual.patch_embed
    assert type(embed) is not type(convolution)
    torch.testing.assert_close(embed(patches), convolution(patches), rtol=1e-5, atol=1e-5)


def test_the_sizes_of_a_model_are_counted_as_they_are(family, plain, tmp_path):
    shapes = Shapes.of(plain.config.to_dict(), tmp_path / "config.json")
    parameters = list(plain.parameters())
    assert (shapes.parameters, shapes.tensors) == (sum(one.numel() for one in parameters), len(parameters))
    root = shapes.parameters - sum(one.numel() for unit in family.shard_units(plain) for one in unit.parameters())
    assert shapes.root == root
    assert shapes.vision == sum(one.numel() for one in plain.model.visual.parameters())


# Windows of Qwen2.5-VL


@pytest.mark.parametrize("family", [FAMILIES["qwen2_5_vl"]], indirect=True)
def test_windows_matter_and_one_layer_sees_the_whole_image(policy, samples, encoder):
    """The comparison above would otherwise say nothing of windows."""
    given: list[Tensor] = []
    for block in policy.model.model.visual.blocks:
        block.register_forward_pre_hook(lambda _, args, named: given.append(named["cu_seqlens"]), with_kwargs=True)
    with torch.no_grad():
        found = torch.cat(packed(policy, samples, encoder))
        first, second, third = (starts.tolist() for starts in given)
        # In the order of the prompts' lengths: 24, 240, 256 and 396 patches.
        assert second == [0, 24, 264, 520, 916]
        assert first == third
        windows = [24, *[64, 16] * 3, *[64] * 4, *[64, 64, 48] * 2, 16, 16, 12]
        assert [end - start for start, end in pairwise(first)] == windows
        policy.model.model.visual.fullatt_block_indexes = [0, 1, 2]
        assert (torch.cat(packed(policy, samples, encoder)) - found).abs().max() > 0.01


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_that_a_forward_makes_is_on_the_device_of_its_inputs(policy, samples, encoder, device):
    """torch's meta device, which computes nothing, stands for a GPU: it refuses tensors of a CPU likewise. The images'
    features are given, since the tower reads their lengths on the host."""
    policy.model.set_attn_implementation(hardware(device).attention)
    policy = policy.bfloat16()
    batch = collate(samples, encoder, policy.prompt_positions)
    images = policy.model.model.get_image_features(
        batch.pixel_values.bfloat16(), batch.image_grid_thw, return_dict=True
    )
    meta = torch.device("meta")
    elsewhere = tree_map_only(Tensor, lambda tensor: tensor.detach().to(meta), dict(images))
    policy = policy.to(meta)
    batch = batch.to(meta)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(policy.model.model, "get_image_features", lambda *_, **__: type(images)(**elsewhere))
        patched.setattr(policy, "_attention_starts", lambda _: {})
        patched.setattr(torch, "_check_tensor_all_with", lambda *_: None)  # these two read tensors
        patched.setattr(
            policy.model.model.language_model, "_deepstack_process", lambda hidden, *_: hidden, raising=False
        )
        logprobs, entropy = policy(**batch.inputs())
    assert logprobs.device == entropy.device == meta
    logprobs.sum().backward()
    assert policy.model.lm_head.weight.grad.device == meta
