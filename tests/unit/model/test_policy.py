import copy
from dataclasses import replace

import pytest
import torch
from some_prompt import some_prompt
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.plain_forward import plain_logprobs
from rft_cluster.common.hardware import hardware
from rft_cluster.learner.collate import collate
from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.model import logprobs as logprobs_module
from rft_cluster.model.encoder import EncodedPrompt
from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import build_model, build_processor
from tests.plain import plain_logits

START, END, IMAGE_PAD = 3, 4, 6  # vision_start, vision_end, image_pad of the tiny tokenizer
FORBIDDEN = [3, 4, 5, 6, 7]
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def processor():
    return build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)


class Encoder:
    """A prompt's seed says its image's height in patches and so all the rest of it."""

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        height, width, words = prompt.seed, 4 + 2 * (prompt.seed % 3), 1 + prompt.seed // 2
        draw = torch.Generator().manual_seed(prompt.seed)
        image = [START, *[IMAGE_PAD] * (height * width // 4), END]
        text = torch.randint(10, 250, (words,), generator=draw).tolist()
        pixels = torch.randn(height * width, 1176, generator=draw)
        return EncodedPrompt([1, 20, *image, *text], pixels, torch.tensor([[1, height, width]]))


ENCODER = Encoder()
# Prompts (by height) with the lengths of their completions.
PACKS = {
    "groups and images of several sizes": {4: [5, 2, 1, 5], 6: [3], 8: [1, 1, 7]},
    "one group": {4: [4, 4, 6]},
    "one completion": {6: [5]},
    "completions of one token": {6: [1, 1]},
    "one completion of one token": {4: [1]},
}


def drawn(pack: dict[int, list[int]]) -> list[TrainingSample]:
    draw = torch.Generator().manual_seed(1)

    def sample(height: int, length: int) -> TrainingSample:
        asked = some_prompt(f"train/0/{height}", "photos/a.png", b"", "Which?", "zero", height)
        tokens = torch.randint(10, 250, (length,), generator=draw).tolist()
        return TrainingSample(asked, ENCODER.encode(asked).token_ids, tokens, [-1.0] * length, 1.0, 0.5, 0)

    return [sample(height, length) for height, lengths in pack.items() for length in lengths]


@pytest.fixture(scope="module")
def plain(processor) -> Qwen2VLForConditionalGeneration:
    """Random, tied, in FP32, its weights large enough for log-probabilities that differ."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(processor.tokenizer).float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


@pytest.fixture
def policy(plain) -> PolicyModel:
    """The same weights as `plain`."""
    model = copy.deepcopy(plain)
    model.set_attn_implementation(hardware("cpu").attention)
    return PolicyModel(model, FORBIDDEN, TEMPERATURE)


def forward(policy: PolicyModel, samples: list[TrainingSample]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of each sample's tokens, in the order of `samples`."""
    # Weights number the samples, so that the packed row's order can be undone.
    numbered = [replace(sample, weight=float(i)) for i, sample in enumerate(samples)]
    batch = collate(numbered, ENCODER, policy.prompt_positions)
    results = policy(**batch.inputs())
    logprobs, entropy = ([values[batch.weights == i] for i in range(len(samples))] for values in results)
    return logprobs, entropy


def expected(plain: Qwen2VLForConditionalGeneration, samples: list[TrainingSample]) -> list[Tensor]:
    return plain_logprobs(plain, samples, ENCODER, FORBIDDEN, TEMPERATURE)


def gradients(model: Qwen2VLForConditionalGeneration, logprobs: list[Tensor]) -> dict[str, Tensor]:
    """The gradient of a sum with a different factor for each token."""
    model.zero_grad()
    flat = torch.cat(logprobs)
    (flat * torch.linspace(-1, 2, len(flat))).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def alone(model: Qwen2VLForConditionalGeneration, sample: TrainingSample) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one sequence by itself, from the logits of all its positions."""
    prompt = ENCODER.encode(sample.prompt)
    logits = plain_logits(model, prompt, sample.token_ids, IMAGE_PAD)[len(prompt.token_ids) - 1 : -1]
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[FORBIDDEN] = False
    logprobs = torch.log_softmax(torch.where(allowed, logits / TEMPERATURE, -torch.inf), -1)
    chosen = logprobs.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    kept = logprobs[:, allowed]
    return chosen, -(kept.exp() * kept).sum(-1)


@pytest.mark.parametrize("chunk", [3, 512])
def test_log_probabilities_are_those_of_each_sequence_alone(policy, plain, monkeypatch, chunk):
    monkeypatch.setattr(logprobs_module, "LOGPROB_CHUNK", chunk)  # 25 tokens make 9 chunks of 3
    samples = drawn(PACKS["groups and images of several sizes"])
    with torch.no_grad():
        logprobs, entropy = forward(policy, samples)
        assert torch.cat(logprobs).std() > 0.5, "a test of equal numbers would be blind"
        for sample, found, spread in zip(samples, logprobs, entropy, strict=True):
            chosen, entropies = alone(plain, sample)
            assert found.dtype == spread.dtype == torch.float32
            torch.testing.assert_close(found, chosen, rtol=0, atol=1e-5)
            torch.testing.assert_close(spread, entropies, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_the_shared_prefix_changes_neither_log_probabilities_nor_gradients(policy, plain, pack, checkpointing):
    if checkpointing:
        policy.train().model.gradient_checkpointing_enable({"use_reentrant": False})
    samples = drawn(pack)
    logprobs, entropy = forward(policy, samples)
    reference = expected(plain, samples)
    assert not any(one.requires_grad for one in entropy)
    for found, wanted in zip(logprobs, reference, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    ours, theirs = gradients(policy.model, logprobs), gradients(plain, reference)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_gradient_checkpointing_computes_each_layer_again(policy):
    policy.train().model.gradient_checkpointing_enable({"use_reentrant": False})
    layer, calls = policy.model.model.language_model.layers[1].mlp, []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    logprobs, _ = forward(policy, drawn(PACKS["one group"]))
    torch.cat(logprobs).sum().backward()
    assert len(calls) == 2


def test_completions_do_not_see_each_other(policy):
    samples = drawn(PACKS["groups and images of several sizes"])
    changed = replace(samples[0], token_ids=[200 - token // 2 for token in samples[0].token_ids])
    with torch.no_grad():
        before, _ = forward(policy, samples)
        after, _ = forward(policy, [changed, *samples[1:]])
    assert not torch.allclose(before[0], after[0], atol=1e-2)
    assert all(torch.equal(one, other) for one, other in zip(before[1:], after[1:], strict=True))


def test_a_completion_does_not_depend_on_who_else_is_in_the_row(policy):
    samples = drawn(PACKS["groups and images of several sizes"])
    with torch.no_grad():
        together, _ = forward(policy, samples)
        for kept in ([0, 3], [7], [1, 2, 4, 6], [7, 0, 4]):  # parts of groups, whole groups, another order
            apart, _ = forward(policy, [samples[i] for i in kept])
            for i, found in zip(kept, apart, strict=True):
                torch.testing.assert_close(found, together[i], rtol=0, atol=1e-5)


def test_patches_are_embedded_as_by_the_convolution(policy, plain):
    patches = torch.randn(12, 1176, generator=torch.Generator().manual_seed(3))
    embed, convolution = policy.model.model.visual.patch_embed, plain.model.visual.patch_embed
    assert type(embed) is not type(convolution)
    torch.testing.assert_close(embed(patches), convolution(patches), rtol=0, atol=1e-5)


def test_each_image_is_seen_once(policy):
    rows = []
    policy.model.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    samples = drawn({4: [3] * 8, 6: [2] * 8})
    forward(policy, samples)
    assert rows == [4 * 6 + 6 * 4]


@pytest.mark.parametrize(("attention", "places"), [("sdpa", {"host"}), ("flash_attention_2", {"device"})])
def test_sdpa_does_not_ask_the_device_for_the_images_lengths_in_each_layer(policy, monkeypatch, attention, places):
    """Each layer reads them three times on the host, and would wait for the GPU."""
    grid = torch.tensor([[1, 4, 6], [1, 8, 4]])
    read: list[str] = []

    class OnDevice(torch.Tensor):
        def cpu(self) -> torch.Tensor:
            read.append("host")
            return grid

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            read.append("device")
            return super().__torch_function__(function, types, args, kwargs)

    monkeypatch.setattr(policy.model.config.vision_config, "_attn_implementation", attention)
    assert policy._attention_starts(grid.as_subclass(OnDevice))["cu_seqlens"].tolist() == [0, 24, 56]
    assert set(read) == places


def test_every_layer_of_the_vision_tower_gets_the_images_lengths_of_the_host(policy, monkeypatch):
    given: list[torch.Tensor] = []
    for block in policy.model.model.visual.blocks:
        block.register_forward_pre_hook(lambda _, args, named: given.append(named["cu_seqlens"]), with_kwargs=True)
    starts = torch.tensor([0, 24, 48], dtype=torch.int32)
    monkeypatch.setattr(policy, "_attention_starts", lambda grid: {"cu_seqlens": starts})
    forward(policy, drawn({4: [2, 2], 6: [1]}))
    assert len(given) == 3
    assert all(one is starts for one in given)


def test_prompt_positions_are_the_model_s_own(policy):
    encoded = ENCODER.encode(drawn({4: [1]})[0].prompt)  # 2 x 3 image tokens, then the end of the image and 3 words
    positions = policy.prompt_positions(encoded)
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9],
    ]


def test_a_forbidden_token_has_no_probability(policy):
    samples = [replace(sample, token_ids=FORBIDDEN[:2]) for sample in drawn({4: [2]})]
    with torch.no_grad():
        logprobs, entropy = forward(policy, samples)
    assert logprobs[0].tolist() == [-torch.inf] * 2
    assert entropy[0].isfinite().all()


def test_gradients_of_a_position_that_several_tokens_read_are_added_in_fp32(plain):
    """All completions read their prompt's last position. On GPUs, indexing would add BF16 in any order."""
    model = copy.deepcopy(plain).bfloat16()
    model.set_attn_implementation(hardware("cpu").attention)
    policy = PolicyModel(model, FORBIDDEN, TEMPERATURE)
    added: list[tuple[str, torch.dtype]] = []

    class Additions(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if any(word in str(function) for word in ("index_add", "index_put", "embedding_dense_backward")):
                added.append((str(function), result.dtype, result.shape))
            return result

    samples = drawn(PACKS["groups and images of several sizes"])
    batch = collate(samples, ENCODER, policy.prompt_positions)
    logprobs, _ = policy(**batch.inputs())
    with Additions():
        logprobs.sum().backward()
    hidden = (batch.input_ids.shape[1], model.config.text_config.hidden_size)
    onto_positions = [(name, dtype) for name, dtype, shape in added if tuple(shape) == hidden]
    assert onto_positions == [("aten.embedding_dense_backward.default", torch.float32)]


def test_layers_are_gathered_one_at_a_time_and_the_tied_weight_with_the_root(policy):
    units = policy.shard_units()
    assert len(units) == 3 + 3  # vision and language layers of the tiny model
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    assert id(policy.model.lm_head.weight) not in inside
    assert sum(len(list(unit.parameters())) for unit in units) == len(inside), "no layer is in two"
