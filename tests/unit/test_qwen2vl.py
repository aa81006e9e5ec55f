import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from rft_cluster import qwen2vl
from rft_cluster.errors import UserError
from rft_cluster.messages import Prompt
from rft_cluster.qwen2vl import PolicyModel, PromptEncoder, check_model_folder, shard_units
from rft_cluster.tiny import build_model, build_processor

START, END, IMAGE_PAD = 3, 4, 6  # vision_start, vision_end, image_pad of the tiny tokenizer
FORBIDDEN = [3, 4, 5, 6, 7]
TEMPERATURE = 0.7


# --- folders that are no model


def write_folder(folder: Path, config: dict | str | None, *files: str) -> str:
    folder.mkdir(exist_ok=True)
    if config is not None:
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
    [{**QWEN, "max_position_embeddings": 1024}, {"model_type": "qwen2_vl", "text_config": {}}],
)
def test_a_model_folder_passes(tmp_path, config):
    check_model_folder(write_folder(tmp_path / "model", config, "model-00001-of-00002.safetensors"), 1024)


def test_a_hub_name_passes_unread():
    check_model_folder("Qwen/Qwen2-VL-2B-Instruct", 10**9)


# --- prompts


@pytest.fixture(scope="module")
def processor():
    return build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)


@pytest.fixture(scope="module")
def encoder(processor, tmp_path_factory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    return PromptEncoder(str(folder), 56 * 56, 56 * 56)


def image_prompt() -> Prompt:
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    return Prompt("train/0/0", "photos/a.png", file.getvalue(), "Which?", "zero", 0)


def test_a_prompt_that_is_too_long_is_refused_with_its_counts(encoder):
    prompt = image_prompt()
    ids = encoder.encode(prompt).token_ids
    assert ids.count(IMAGE_PAD) == 4  # resized to 56 x 56 pixels, 28 x 28 a token
    assert encoder.check_lengths([prompt], len(ids)) == len(ids)
    with pytest.raises(UserError) as caught:
        encoder.check_lengths([prompt], len(ids) - 1)
    for text in (
        *("the prompt of photos/a.png", f"has {len(ids)} tokens (4 of the image, {len(ids) - 4} of the text)"),
        f"model.max_prompt_tokens = {len(ids) - 1}",
    ):
        assert text in str(caught.value)


def test_vision_tokens_are_forbidden_and_both_stop_tokens_known(encoder):
    assert encoder.vision_token_ids == FORBIDDEN
    assert encoder.stop_token_ids == encoder.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert encoder.image_token_id == IMAGE_PAD


# --- log-probabilities


@dataclass
class Sequence:
    prompt: list[int]
    completion: list[int]
    pixels: Tensor  # [patches, 1176]
    grid: list[int]


@pytest.fixture(scope="module")
def model(processor) -> Qwen2VLForConditionalGeneration:
    """Random, tied, in FP32, its weights large enough for log-probabilities that differ."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(processor.tokenizer).float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    """Prompts with images of 4, 6 and 4 tokens; completions of 5, 2 and 1 tokens."""
    draw = torch.Generator().manual_seed(1)

    def made(grid: list[int], text: int, length: int) -> Sequence:
        patches = grid[1] * grid[2]
        words = torch.randint(10, 250, (text + length,), generator=draw).tolist()
        prompt = [1, 20, START, *[IMAGE_PAD] * (patches // 4), END, *words[:text]]
        return Sequence(prompt, words[text:], torch.randn(patches, 1176, generator=draw), grid)

    return [made([1, 4, 4], 3, 5), made([1, 4, 6], 6, 2), made([1, 4, 4], 1, 1)]


def inputs(sequences: list[Sequence], pad: int = 0, completion_pad: int = 0) -> dict[str, Tensor]:
    rows = [one.prompt + one.completion for one in sequences]
    width, longest = max(map(len, rows)), max(len(one.completion) for one in sequences)
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "pixel_values": torch.cat([one.pixels for one in sequences]),
        "image_grid_thw": torch.tensor([one.grid for one in sequences]),
        "predictor_index": torch.tensor(
            [[min(len(one.prompt) - 1 + i, width - 1) for i in range(longest)] for one in sequences]
        ),
        "completion_ids": torch.tensor(
            [one.completion + [completion_pad] * (longest - len(one.completion)) for one in sequences]
        ),
    }


def alone(model: Qwen2VLForConditionalGeneration, one: Sequence) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one sequence by itself, from the logits of all its positions."""
    ids = torch.tensor([one.prompt + one.completion])
    logits = model(
        input_ids=ids,
        pixel_values=one.pixels,
        image_grid_thw=torch.tensor([one.grid]),
        mm_token_type_ids=(ids == IMAGE_PAD).long(),
    ).logits[0, len(one.prompt) - 1 : -1]
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[FORBIDDEN] = False
    logprobs = torch.log_softmax(torch.where(allowed, logits / TEMPERATURE, -torch.inf), -1)
    chosen = logprobs.gather(-1, torch.tensor(one.completion)[:, None])[:, 0]
    kept = logprobs[:, allowed]
    return chosen, -(kept.exp() * kept).sum(-1)


@pytest.fixture
def policy(model) -> PolicyModel:
    model.zero_grad()
    return PolicyModel(model, FORBIDDEN, TEMPERATURE)


def real(sequences: list[Sequence]) -> Tensor:
    """[B, R] bool: a real completion token."""
    longest = max(len(one.completion) for one in sequences)
    return torch.tensor([[i < len(one.completion) for i in range(longest)] for one in sequences])


@pytest.mark.parametrize("chunk", [3, 512])
def test_log_probabilities_are_those_of_each_sequence_alone(policy, model, sequences, monkeypatch, chunk):
    monkeypatch.setattr(qwen2vl, "LOGPROB_CHUNK", chunk)  # 3 sequences x 5 tokens make 5 chunks of 3
    with torch.no_grad():
        expected = [alone(model, one) for one in sequences]
        logprobs, entropy = policy(**inputs(sequences))
    assert logprobs.shape == entropy.shape == (3, 5)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert torch.cat([chosen for chosen, _ in expected]).std() > 0.5, "a test of equal numbers would be blind"
    mask = real(sequences)
    assert logprobs[mask].tolist() == pytest.approx(torch.cat([chosen for chosen, _ in expected]).tolist(), abs=2e-5)
    assert entropy[mask].tolist() == pytest.approx(
        torch.cat([entropies for _, entropies in expected]).tolist(), abs=2e-5
    )


def test_padding_does_not_matter(policy, sequences):
    with torch.no_grad():
        one = policy(**inputs(sequences))
        other = policy(**inputs(sequences, pad=99, completion_pad=IMAGE_PAD))
    for first, second in zip(one, other, strict=True):
        assert first[real(sequences)].tolist() == pytest.approx(second[real(sequences)].tolist(), abs=2e-5)


@pytest.mark.parametrize("chunk", [3, 512])
def test_gradients_are_those_of_each_sequence_alone(policy, model, sequences, monkeypatch, chunk):
    monkeypatch.setattr(qwen2vl, "LOGPROB_CHUNK", chunk)
    factors = torch.linspace(-1, 1, 15).view(3, 5)  # another for each token
    names = [
        "model.language_model.embed_tokens.weight",  # tied: also the output layer
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.0.attn.qkv.weight",
    ]
    parameters = [model.get_parameter(name) for name in names]
    logprobs, entropy = policy(**inputs(sequences))
    assert not entropy.requires_grad
    found = torch.autograd.grad((logprobs * factors)[real(sequences)].sum(), parameters)
    total = sum(
        (alone(model, one)[0] * row[: len(one.completion)]).sum() for one, row in zip(sequences, factors, strict=True)
    )
    for ours, theirs in zip(found, torch.autograd.grad(total, parameters), strict=True):
        assert theirs.abs().max() > 1e-3
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_a_forbidden_token_has_no_probability(policy, sequences):
    batch = inputs(sequences[:1])
    batch["completion_ids"] = torch.tensor([FORBIDDEN])
    with torch.no_grad():
        logprobs, entropy = policy(**batch)
    assert logprobs.tolist() == [[-torch.inf] * 5]
    assert entropy.isfinite().all()


def test_layers_are_gathered_one_at_a_time_and_the_tied_weight_with_the_root(policy):
    units = shard_units(policy)
    assert len(units) == 3 + 3  # vision and language layers of the tiny model
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    assert id(policy.model.lm_head.weight) not in inside
    assert sum(len(list(unit.parameters())) for unit in units) == len(inside), "no layer is in two"
