"""A Qwen2-VL of 87 million parameters with random weights, and photographs for it: no download.

    python benchmarks/bench_model.py --folder /tmp/bench

Its parts have the shares of Qwen2-VL-2B (vision tower 29 %, language model 56 %, embedding 15 %), so that none of them
decides a comparison which it would not decide there. Every one of its 16,384 tokens decodes to text. A completion never
ends early, whoever samples it: all have as many tokens as are asked for, and two programs that are compared do the same
work without a setting of either.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rft_cluster.common.files import unfinished
from rft_cluster.model.qwen2vl import STOP_TOKENS
from rft_cluster.model.tiny.build import CHAT_TEMPLATE, SPECIAL_TOKENS

VOCABULARY = 16_384
QUESTION = Path(__file__).parent / "question.txt"
IMAGES = 128  # of each size: no step of a run sees one again
SIDES = (448, 112)  # pixels: 256 and 16 image tokens
CONSTANT = 0.3  # of hidden unit 0 at the output, in the units of the other 767, which have about 0.6
NEVER = -50.0  # the stop tokens' weight for it: about 20 nats


def bench_model(folder: Path) -> Path:
    """The model's folder in `folder`, made on first use; the photographs lie beside it, see `bench_images`."""
    path = folder / "model-87m"
    if not path.exists():
        processor = build_processor()
        with unfinished(path) as building:
            build_model(processor.tokenizer).to(torch.bfloat16).save_pretrained(building)
            processor.save_pretrained(building)
    return path


def bench_images(folder: Path, side: int) -> Path:
    """A folder of two classes, each of `IMAGES / 2` square photographs: random cuts of scikit-learn's two samples."""
    path = folder / f"photos-{IMAGES}-{side}"
    if not path.exists():
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


def build_processor() -> Qwen2VLProcessor:
    """A byte-level BPE trained on made-up words until it has `VOCABULARY` tokens, Qwen2-VL's image processor."""
    rng = np.random.default_rng(0)
    syllables = [c + v + e for c in "bcdfghjklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "s", "t", "l")]
    words = [" " + "".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(40_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*[QUESTION.read_text()] * 50, *words], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=min(SIDES) ** 2, max_pixels=max(SIDES) ** 2),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """Random FP32 weights; the stop tokens cannot be sampled."""
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"the tokenizer came out with {len(tokenizer)} tokens, not {VOCABULARY}")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "model_type": "qwen2_vl_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "type": "mrope", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
    }
    vision = {
        "depth": 6,
        "embed_dim": 512,
        "hidden_size": 768,
        "num_heads": 8,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    stops = [ids[token] for token in STOP_TOKENS]
    with torch.no_grad():
        # Hidden unit 0 is kept apart: no token brings it in, no layer writes it but the last, which sets it to a
        # constant (the value bias passes through attention as it is). Of all tokens only the stop tokens read it.
        layers = model.model.language_model.layers
        model.model.language_model.embed_tokens.weight[:, 0] = 0.0
        model.model.visual.merger.mlp[2].weight[0] = 0.0
        for layer in layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        layers[-1].self_attn.v_proj.bias[:] = CONSTANT
        layers[-1].self_attn.o_proj.weight[0] = 1.0 / text["hidden_size"]
        model.model.language_model.embed_tokens.weight[stops, 0] = NEVER
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"]
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = bench_model(options.folder)
    for side in SIDES:
        bench_images(options.folder, side)
    size = (path / "model.safetensors").stat().st_size
    print(json.dumps({"model": str(path), "parameters": size // 2, "images": IMAGES, "sides": SIDES}))


if __name__ == "__main__":
    main()
