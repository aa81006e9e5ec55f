"""The models of the benchmarks, all with random weights: no download.

    bench_model(CACHE)              87 million parameters, for speed
    transfer_model(CACHE, "tiny")   or "medium": for the transfer of weights
    family_model(folder, family)    a million parameters, of any family; the others are Qwen2-VL
    true_model(folder)              2.2 billion in the shapes of Qwen2-VL-2B-Instruct; other configurations by argument

The first one's parts have the shares of the 2B's (vision tower 29 %, language model 56 %, embedding 15 %), so that none
of them decides a comparison which it would not decide there. Every one of its 16,384 tokens decodes to text. Its
completions never end early, whoever samples them: all have as many tokens as are asked for, and two programs that are
compared do the same work without a setting of either.
"""

import copy
import json
from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from rft_cluster.common.files import unfinished
from rft_cluster.model.families.family import STOP_TOKENS, Family
from rft_cluster.model.families.known import family_of
from rft_cluster.model.tiny.build import SPECIAL_TOKENS, build_model, build_processor, processor_around
from rft_cluster.prompts import render_template

QUESTION = Path(__file__).parent / "question.txt"
VOCABULARY = 16_384
IMAGES = 128  # of each size: no step of a run sees one again
SIDES = (448, 112)  # pixels: 256 and 16 image tokens
CONSTANT = 0.3  # of hidden unit 0 at the output, in the units of the other 767, which have about 0.6
NEVER = -50.0  # the stop tokens' weight for it: about 20 nats
# Of the language model and of the vision tower: width, layers, inner width.
SHARES = ((768, 8, 2048), (512, 6, 2048))
SIZES = {"tiny": ((128, 3, 384), (96, 3, 192)), "medium": ((1024, 12, 4096), (512, 8, 1024))}
TRANSFER_PIXELS = 56 * 56
TRANSFER_QUESTION = "Which?"
# The models of true shapes, by family. Each file has the published config.json. That of Qwen2-VL also has the special
# tokens, which are those of the others, and the published tensors (name -> shape, * for each layer; `lm_head` is tied).
TRUE = {"qwen2_vl": "qwen2_vl_2b", "qwen2_5_vl": "qwen2_5_vl_3b", "qwen3_vl": "qwen3_vl_2b"}
TRUE_TOKENS = (4, 512)  # of an image


def resized(tokenizer: Any, text: tuple[int, int, int], vision: tuple[int, int, int], heads: int) -> Any:
    """The tiny model's architecture in another size, untrained. `heads`: of keys and values."""
    small = build_model(tokenizer)
    config, width = small.config, text[0]
    attention = max(4, width // 64)
    config.text_config.update({"hidden_size": width, "num_hidden_layers": text[1], "intermediate_size": text[2]})
    config.text_config.update({"num_attention_heads": attention, "num_key_value_heads": heads})
    config.text_config.layer_types = ["full_attention"] * text[1]
    eighth, rest = width // attention // 8, 3 * width // attention // 16
    config.text_config.rope_parameters["mrope_section"] = [eighth, rest, rest]
    config.vision_config.update({"hidden_size": width, "embed_dim": vision[0], "depth": vision[1]})
    config.vision_config.update({"num_heads": max(4, vision[0] // 64), "mlp_ratio": vision[2] // vision[0]})
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = small.generation_config
    return model


def transfer_model(cache: Path, size: str) -> Path:
    """The folder of one of `SIZES`, made on first use."""
    folder = cache / f"weight-transfer-{size}"
    if not (folder / "config.json").exists():
        processor = build_processor(["rose"], ["group-00"], TRANSFER_QUESTION, TRANSFER_PIXELS)
        text, vision = SIZES[size]
        model = resized(processor.tokenizer, text, vision, heads=max(4, text[0] // 64) // 2)
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def family_model(folder: Path, family: Family, pixels: int) -> Path:
    """Write a small model whose log-probabilities depend on the image, in BF16; images have up to `pixels`."""
    processor = build_processor(["rose", "lily"], ["group-00"], TRANSFER_QUESTION, pixels, family)
    torch.manual_seed(0)
    model = spread(build_model(processor.tokenizer, family))
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def spread(model: Any) -> Any:
    """Enlarge an untrained model's weights, for log-probabilities that differ. Returns the model."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)  # they begin at 0, where one that is left out would not show
    return model


# 87 million parameters


def bench_model(cache: Path) -> Path:
    """The model's folder, made on first use; the photographs lie beside it, see `bench_images`."""
    path = cache / "model-87m"
    if not path.exists():
        processor = _bench_processor()
        with unfinished(path) as building:
            _endless(resized(processor.tokenizer, *SHARES, heads=2)).to(torch.bfloat16).save_pretrained(building)
            processor.save_pretrained(building)
    return path


def bench_images(cache: Path, side: int) -> Path:
    """A folder of two classes, each of `IMAGES / 2` square photographs: random cuts of scikit-learn's two samples."""
    path = cache / f"photos-{IMAGES}-{side}"
    if not path.exists():
        from sklearn.datasets import load_sample_images

        with unfinished(path) as building:
            rng = np.random.default_rng(0)
            for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
                (building / name).mkdir()
                for index in range(IMAGES // 2):
                    cut = int(rng.integers(200, min(photo.shape[:2]) + 1))
                    top, left = (int(rng.integers(0, length - cut + 1)) for length in photo.shape[:2])
                    image = Image.fromarray(photo[top : top + cut, left : left + cut])
                    image.resize((side, side), Image.Resampling.BICUBIC).save(building / name / f"{index:02d}.png")
    return path


def _bench_processor() -> Qwen2VLProcessor:
    """A byte-level BPE trained on made-up words until it has `VOCABULARY` tokens, Qwen2-VL's image processor."""
    rng = np.random.default_rng(0)
    syllables = ["".join(parts) for parts in product("bcdfghjklmnprstvwz", "aeiou", ("", "n", "r", "s", "t", "l"))]
    words = [" " + "".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(40_000)]
    tokenizer = _byte_level(VOCABULARY, [*[QUESTION.read_text()] * 50, *words], list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the tokenizer came out with {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    return processor_around(tokenizer, min(SIDES) ** 2, max(SIDES) ** 2)


def _byte_level(size: int, texts: list[str], special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _endless(model: Qwen2VLForConditionalGeneration) -> Qwen2VLForConditionalGeneration:
    """The stop tokens cannot be sampled. Hidden unit 0 is kept apart: no token brings it in, no layer writes it but the
    last, which sets it to a constant (the value bias passes through attention as it is). Of all tokens only the stop
    tokens read it."""
    stops = [SPECIAL_TOKENS.index(token) for token in STOP_TOKENS]  # special tokens have the first ids
    with torch.no_grad():
        layers = model.model.language_model.layers
        model.model.language_model.embed_tokens.weight[:, 0] = 0.0
        model.model.visual.merger.mlp[2].weight[0] = 0.0
        for layer in layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        layers[-1].self_attn.v_proj.bias[:] = CONSTANT
        layers[-1].self_attn.o_proj.weight[0] = 1.0 / model.config.text_config.hidden_size
        model.model.language_model.embed_tokens.weight[stops, 0] = NEVER
    return model


# Billions of parameters


@cache
def published(family: str) -> dict[str, Any]:
    """What is known of the published model of a family."""
    return json.loads((Path(__file__).parent / f"{TRUE[family]}.json").read_text())


def published_layout() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the published checkpoint of Qwen2-VL-2B-Instruct."""
    config = true_config()
    counts = {"model": config["num_hidden_layers"], "visual": config["vision_config"]["depth"]}
    return {
        name.replace("*", str(layer)): tuple(shape)
        for name, shape in published("qwen2_vl")["tensors"].items()
        for layer in range(counts[name.split(".")[0]] if "*" in name else 1)
    }


def true_question() -> str:
    """The text of a Flower102 prompt."""
    return render_template("think_answer", "flower", ["rose"])


def true_config(family: str = "qwen2_vl", layers: int = 0, blocks: int = 0) -> dict[str, Any]:
    """The published configuration. `layers`, `blocks`: of text and of vision, if not all."""
    config = copy.deepcopy(published(family)["config"])
    text, vision = config.get("text_config", config), config["vision_config"]
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    vision["depth"] = blocks or vision["depth"]
    return config


def empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a configuration in BF16, without storage."""
    family = family_of(config["model_type"], "the configuration")
    with torch.device("meta"):
        settings = getattr(transformers, family.config_class)(**config)
        return getattr(transformers, family.model_class)(settings).to(torch.bfloat16)


def true_model(folder: Path, device: str = "cpu", config: Mapping[str, Any] | None = None) -> None:
    """Write a model's folder: seeded noise in BF16, norms of 1; the published configuration, shards, token ids.

    `device`: draws the noise; a GPU needs a second for it and draws other numbers. `config`: Qwen2-VL-2B's by default.
    """
    config = config or true_config()
    model = empty_model(config).to_empty(device=device)
    model.tie_weights()
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=draw)
    model.generation_config = GenerationConfig(
        bos_token_id=151643, pad_token_id=151643, eos_token_id=[151645, 151643], do_sample=True, top_k=1, top_p=0.001,
        temperature=0.01,
    )  # fmt: skip
    model.save_pretrained(folder, max_shard_size="4GB")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _true_processor(family_of(config["model_type"], folder)).save_pretrained(folder)


def _true_processor(family: Family) -> Any:
    """A byte-level tokenizer of its own, whose special tokens have the published ids. Its words are those of the
    question; unused words fill the ids up to the special tokens."""
    learned = _byte_level(2000, [true_question(), "system user assistant"], [])
    state = json.loads(learned.to_str())["model"]
    first, special = (published("qwen2_vl")[key] for key in ("first_special_id", "special_tokens"))
    vocabulary = state["vocab"] | {f"<unused{i}>": i for i in range(len(state["vocab"]), first)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in state["merges"]]))
    tokenizer.pre_tokenizer, tokenizer.decoder = learned.pre_tokenizer, learned.decoder
    tokenizer.add_special_tokens(special)
    assert [tokenizer.token_to_id(token) for token in special] == list(range(first, first + len(special)))
    low, high = (tokens * family.side**2 for tokens in TRUE_TOKENS)
    return processor_around(tokenizer, low, high, special, max_tokens=32_768, family=family)
