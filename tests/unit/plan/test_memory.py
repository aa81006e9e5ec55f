"""GiB by hand for the recipe on one GPU, and what each setting changes."""

import json
from pathlib import Path

import pytest

from rft_cluster.config import Config, load_config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.cards import CARDS
from rft_cluster.plan.memory import GIB, Part, activations, learner_parts, logits, state, total
from rft_cluster.plan.places import ASLEEP, engine, places
from rft_cluster.plan.work import fullest_row

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHAPES = Shapes.of(json.loads((BENCHMARKS / "qwen2_vl_2b.json").read_text())["config"], Path("config.json"))
# Four groups of 512 image and 90 text tokens, with 8 answers of 53 tokens, of which 52 are in the row.
ROW = fullest_row([PromptLength(512, 90)] * 16, 8, 53, 4096)


def one_gpu(*overrides: str) -> Config:
    return load_config("flower102_1gpu", list(overrides))


def gib(parts: list[Part]) -> dict[str, float]:
    return {part.name: round(part.learn / GIB, 1) for part in parts}


def test_the_row_of_the_recipe():
    assert (ROW.prompts, ROW.tokens, ROW.patches) == (4, 4 * (602 + 8 * 52), 4 * 2048)
    assert ROW.keys == 4 * (602 + 8 * (602 + 52))
    assert ROW.predicted == 4 * 8 * 53


def test_a_learner_s_state_by_hand():
    held = state(SHAPES, one_gpu())
    # 2,208,985,600 parameters: 4 bytes each are 8.23 GiB, 2 bytes 4.11
    assert [round(value / GIB, 2) for value in (held.weights, held.gradients, held.moments, held.reference)] == [
        *(8.23, 8.23, 16.46, 4.11)
    ]


def test_activations_of_the_recipe_s_row_by_hand():
    kept = activations(SHAPES, one_gpu(), ROW)
    # 4,072 tokens x 28 layers x 102,456 bytes, and 23,336 keys x 28 x 1,024; 8,192 patches x 32 x 58,952
    text = 28 * (4072 * 102_456 + 23_336 * 1024)
    assert round(text / GIB, 1) == 11.5
    assert text < kept.text < 1.02 * text
    vision = 32 * 8192 * 58_952
    assert round(vision / GIB, 1) == 14.4
    assert vision < kept.vision < 1.02 * vision


def test_the_recipe_s_peak_on_one_gpu():
    parts = learner_parts(SHAPES, one_gpu(), ROW, micro_batches=4)
    assert gib(parts) == {
        **{"weights of the policy": 8.2, "moments of AdamW": 16.5, "gradients": 8.2, "reference": 4.1},
        **{"gathered by FSDP": 1.0, "activations": 26.1, "logits": 1.3, "temporaries": 0.0},
    }
    assert 64 <= total(parts, "learn") / GIB <= 66
    assert total(parts, "generate") / GIB == pytest.approx(8.23 + 16.46 + 4.11 + 0.5, abs=0.01)


def test_logits_are_bounded_by_a_chunk():
    config = one_gpu()
    # 512 x 151,936 logits, three FP32 tensors of them; and from the second chunk on the head's gradient in BF16
    assert logits(SHAPES, config, 512) == 512 * 151_936 * 12
    assert logits(SHAPES, config, 513) == logits(SHAPES, config, 5000) == 512 * 151_936 * 12 + 2 * 151_936 * 1536


def test_learners_share_the_state_and_not_the_activations():
    one = {part.name: part.learn for part in learner_parts(SHAPES, one_gpu(), ROW, 4)}
    four = {part.name: part.learn for part in learner_parts(SHAPES, load_config("flower102", []), ROW, 4)}
    for name in ("weights of the policy", "moments of AdamW", "gradients", "reference"):
        assert four[name] == one[name] / 4
    for name in ("activations", "logits"):
        assert four[name] == one[name]


def test_gradient_checkpointing_leaves_the_inputs_and_one_layer():
    parts = {part.name: part.learn for part in learner_parts(SHAPES, one_gpu(), ROW, 4)}
    again = learner_parts(SHAPES, one_gpu("learners.gradient_checkpointing=true"), ROW, 4)
    assert total(again, "learn") < sum(parts.values()) - 20 * GIB  # "gives back 23 GiB"


def test_with_short_rows_the_root_s_gradient_is_the_peak():
    """269 million parameters of embedding, merger and patch embedding: BF16 as computed, FP32 for the sum over ranks,
    and the FP32 sum, beside that of the micro-batches before."""
    row = fullest_row([PromptLength(16, 90)], 8, 20, 4096)
    parts = {part.name: part.learn for part in learner_parts(SHAPES, one_gpu(), row, micro_batches=2)}
    root = 151_936 * 1536 + 1536 + 1_505_280 + 34_087_936
    assert parts["temporaries"] == (2 + 4 + 4) * root
    assert parts["gathered by FSDP"] == 2 * 2 * root and parts["activations"] == 0
    first = {part.name: part.learn for part in learner_parts(SHAPES, one_gpu(), row, micro_batches=1)}
    assert first["temporaries"] == (2 + 4) * root


def test_adapters_train_on_a_base_in_bf16():
    config = one_gpu("model.lora.rank=64", "model.lora.alpha=128")
    held = state(SHAPES, config)
    assert (held.reference, held.gradients) == (0, 4 * 73_859_072)
    assert held.weights == 2 * 2_208_985_600 + 4 * 73_859_072
    assert activations(SHAPES, config, ROW).vision < 0.02 * activations(SHAPES, one_gpu(), ROW).vision


def test_offloaded_state_is_not_on_the_gpu():
    parts = gib(learner_parts(SHAPES, one_gpu("learners.cpu_offload=true"), ROW, 4))
    assert parts["weights of the policy"] == parts["moments of AdamW"] == parts["reference"] == 0
    assert parts["gathered by FSDP"] == 1.0 and parts["activations"] == 26.1


def test_gradients_of_one_micro_batch_come_when_activations_go():
    one = gib(learner_parts(SHAPES, one_gpu(), ROW, micro_batches=1))
    assert one["gradients"] == 0 and one["activations"] == 26.1


def test_on_cpus_attention_keeps_fp32():
    """SDPA there keeps query and output in FP32 (9,216 bytes more a token), and keys and values twice as large."""
    there = activations(SHAPES, one_gpu(), ROW).text
    gpu_keys = ("cluster.device=cpu", "cluster.dtype=bfloat16", "generators.gpus=0", "learners.gpus=0")
    here = activations(SHAPES, one_gpu(*gpu_keys), ROW).text
    assert here - there == 28 * (9216 * ROW.tokens + 1024 * ROW.keys)


def test_an_engine_gives_the_cache_what_is_left():
    serving = engine(SHAPES, one_gpu(), 79.2)
    assert serving.weights + serving.working + serving.cache + ASLEEP == pytest.approx(0.4 * 79.2 * GIB)
    assert serving.tokens == pytest.approx(serving.cache / 28_672)  # 2 x 256 x 2 bytes x 28 layers


def test_phases_on_a_shared_gpu():
    (gpu,) = places(SHAPES, one_gpu(), CARDS["h100"], ROW, 4)
    assert gpu.fullest == "learn" and 0 < gpu.free / GIB < 15
    # A transfer has the engine's weights beside the learner's state, and neither activations nor the KV cache.
    assert gpu.peak("transfer") < gpu.peak("generate") < gpu.peak("learn")
    assert [
        place.name.partition(",")[0] for place in places(SHAPES, load_config("flower102", []), CARDS["h100"], ROW, 1)
    ] == [*("GPU of a learner", "GPU of a generator")]
