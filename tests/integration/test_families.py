"""vLLM beside each family's learner: equal log-probabilities, and updated engines that equal fresh ones.

Images of several sizes of 224 pixels and more, so that Qwen2.5-VL attends in several windows, cut ones among them.
Qwen3-VL's chat template is a Thinking variant's. (Qwen2-VL's update is in test_weight_update.py.)
"""

import gc
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import PreTrainedModel

from benchmarks.models import TRANSFER_QUESTION as TEXT
from benchmarks.models import family_model
from rft_cluster.common.errors import StaleGenerator, WeightTransferError
from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config, load_config
from rft_cluster.data.images import image_sha256
from rft_cluster.generator.generator import Generator
from rft_cluster.learner.collate import collate
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Example, Group, ImageRef, Images, Prompt, Sampling, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.family import Family
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.policy import load_reference
from rft_cluster.weights.source import WIRE_DTYPE
from tests.integration.updates import (
    CURES,
    GREEDY,
    Weights,
    answers_from_disk,
    check_an_update,
    check_that_a_cure_is_needed,
    drop,
    make_generator,
    noisy,
    send,
    weights_of,
)
from tests.unit.model.chat_templates import THINKING

SAMPLED = Sampling(4, 1.0, 12)
SIZES = [(224, 224), (236, 301), (420, 130), (60, 500)]
# Above, below and between the limits, at and off the multiples of a token's side, up to 1:20.
ODD_SIZES = [
    *((1, 1), (9, 180), (27, 29), (31, 33), (63, 65), (97, 101), (111, 113), (127, 640), (137, 137), (196, 196)),
    *((197, 223), (225, 255), (256, 256), (287, 289), (300, 1000), (333, 221), (448, 447), (511, 77), (1023, 767)),
    (1999, 101),
]
GAP = 1e-4  # nats


LIMITS = ["model.min_image_tokens=49", "model.max_image_tokens=100", "model.max_prompt_tokens=256"]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("digits", LIMITS)


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """Coarse noise in all sizes, by SHA-256."""
    rng, files = np.random.default_rng(0), {}
    for width, height in SIZES + ODD_SIZES:
        file = io.BytesIO()
        noise = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        noise.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
        files[image_sha256(file.getvalue())] = file.getvalue()
    return files


@pytest.fixture(scope="module")
def prompts(of_all_sizes: list[Prompt]) -> list[Prompt]:
    return of_all_sizes[: len(SIZES)]


@pytest.fixture(scope="module")
def of_all_sizes(pictures: dict[str, bytes]) -> list[Prompt]:
    return [
        Prompt(f"train/0/{i}", Example(ImageRef(f"noise/{i}.png", sha256), "rose", ()), TEXT, i)
        for i, sha256 in enumerate(pictures)
    ]


# Tensors that Qwen2-VL does not have, by a part of their names.
OWN = {
    "qwen2_5_vl": ["visual.blocks.1.mlp.gate_proj.weight", "visual.blocks.0.mlp.up_proj.bias"],
    "qwen3_vl": [
        *("visual.patch_embed.proj.bias", "visual.pos_embed", "visual.deepstack_merger_list.1.linear_fc1.bias"),
        *("visual.deepstack_merger_list.0.norm", "layers.0.self_attn.k_norm"),
    ],
}


@pytest.fixture(scope="module", params=[family for family in FAMILIES.values() if family.model_type != "qwen2_vl"])
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def folder(family: Family, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose log-probabilities depend on the image."""
    path = family_model(tmp_path_factory.mktemp(family.model_type), family, config.model.pixels(family.side)[1])
    if family.model_type == "qwen3_vl":
        (path / "chat_template.jinja").write_text(THINKING)
    return path


def model_in(folder: Path, family: Family) -> PreTrainedModel:
    return getattr(transformers, family.model_class).from_pretrained(folder, dtype=WIRE_DTYPE)


def weights_in(folder: Path, family: Family) -> Weights:
    return weights_of(model_in(folder, family))


@pytest.fixture(scope="module")
def changed(folder: Path, family: Family) -> Weights:
    return noisy(weights_in(folder, family), 0.03)


@pytest.fixture(scope="module")
def fresh_answers(
    folder: Path, family: Family, changed: Weights, config: Config, pictures: Images, prompts: list[Prompt],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Group]:  # fmt: skip
    export = tmp_path_factory.mktemp("export")
    return answers_from_disk(model_in(folder, family), str(folder), changed, export, config, pictures, prompts)


@pytest.fixture(scope="module")
def generator(
    folder: Path, config: Config, pictures: Images, fresh_answers: list[Group]
) -> Iterator[Generator]:  # after `fresh_answers`, whose engine is gone by then
    yield make_generator(str(folder), config, pictures)
    gc.collect()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES, indirect=True)
def test_generator_and_learner_agree_on_tokens_and_log_probabilities(
    folder: Path, family: Family, pictures: Images, of_all_sizes: list[Prompt]
):
    """In FP32, where no rounding hides a window, a position or a bias that one of them leaves out."""
    config = load_config("digits", [*LIMITS, "cluster.dtype=float32"])
    generator = make_generator(str(folder), config, pictures)
    generator.serve_checkpoint(0)
    groups = generator.generate(of_all_sizes, SAMPLED, version=0)
    model, devices = config.model, hardware("cpu", config.cluster.dtype)
    encoder = PromptEncoder(str(folder), model)
    # vLLM's own processor has expanded the prompts: as many image tokens as the learner's rows of patches have.
    tokens = [encoder.encode(TEXT, pictures[prompt.example.image.sha256]).token_ids for prompt in of_all_sizes]
    assert [group.prompt_token_ids for group in groups] == tokens
    assert len({len(row) for row in tokens}) > 8, "images of many sizes"
    opening = "<think>\n" if family.model_type == "qwen3_vl" else ""
    assert encoder.opening == opening
    for group in groups:
        assert encoder.tokenizer.decode(group.prompt_token_ids).endswith(f"assistant\n{opening}")
        for one in group.completions:
            written = encoder.tokenizer.decode(one.token_ids, skip_special_tokens=True)
            # Half a character at its end is left out of the text.
            assert one.text.startswith(opening) and (opening + written).startswith(one.text)
    policy = load_reference(str(folder), model, devices.attention, encoder.forbidden_token_ids, SAMPLED.temperature)
    policy = policy.float()
    samples = [
        TrainingSample(group.prompt, group.prompt_token_ids, one.token_ids, one.generator_logprobs, 1.0, 1.0, index)
        for group in groups
        for index, one in enumerate(group.completions)
    ]
    batch = collate(samples, PromptCache(encoder, pictures, 0), policy.prompt_positions)
    with torch.no_grad():
        logprobs, _ = policy(**batch.inputs())
    assert logprobs.std() > 0.5, "a test of equal numbers would be blind"
    gaps = (logprobs - batch.generator_logprobs).abs().split([len(one.token_ids) for one in batch.completions])
    assert max(float(gap.mean()) for gap in gaps) <= GAP, "of images of every size"
    # With other pixels the log-probabilities are others: the images are seen.
    with torch.no_grad():
        other, _ = policy(**replace(batch, pixel_values=batch.pixel_values.flip(0)).inputs())
    assert (other - logprobs).abs().mean() > 100 * GAP


def test_an_updated_engine_equals_a_fresh_one(
    generator: Generator, folder: Path, family: Family, changed: Weights, prompts: list[Prompt],
    fresh_answers: list[Group],
):  # fmt: skip
    check_an_update(generator, weights_in(folder, family), changed, prompts, fresh_answers)


@pytest.mark.parametrize("cure", CURES)
def test_each_cure_is_needed(
    cure: str, generator: Generator, folder: Path, family: Family, changed: Weights, prompts: list[Prompt],
    fresh_answers: list[Group], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    original = weights_in(folder, family)
    check_that_a_cure_is_needed(cure, generator, original, changed, prompts, fresh_answers, monkeypatch)


def test_a_tensor_of_the_family_s_own_that_does_not_arrive_is_caught(
    generator: Generator, folder: Path, family: Family, changed: Weights, prompts: list[Prompt]
):
    original = weights_in(folder, family)
    for number, lost in enumerate(OWN[family.model_type]):
        assert any(lost in name for name in original), lost
        send(generator, original, version=10 + 2 * number)
        with pytest.MonkeyPatch.context() as broken:
            drop(lost, broken, generator)
            with pytest.raises(WeightTransferError, match="arrived but 1 layers did not load theirs"):
                send(generator, changed, version=11 + 2 * number)
        with pytest.raises(StaleGenerator):
            generator.generate(prompts, GREEDY, version=11 + 2 * number)
