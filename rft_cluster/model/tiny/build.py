"""Build a small, real Qwen VL model for one image data set: the model of `model.path: tiny`.

Its folder has the same files as a published one (config, safetensors, byte-level tokenizer, processor with chat
template, generation config), and loads in transformers and vLLM without remote code. With about a million parameters,
GRPO on it runs on a laptop. Rewards could not teach a randomly initialised model, which sees nothing and never writes
an answer. So the model is warm-started WITHOUT labels, from unlabelled images of the data set:

- It learns to SEE which images look alike. A nearest-neighbour graph gives each image a place on a spectral map, and
  k-means cuts the map into groups. The model learns to name an image's groups, and to predict its place on the map and
  its looks from its image tokens and just before the answer (with extra heads that are discarded).
- It learns to WRITE `<think>group-03 kind-017</think><answer>NAME</answer>`. The words in `<think>` are the names of
  the image's coarse and fine group: what it saw, NOT reasoning. For a prompt that shows `<answer>` but no `<think>`, it
  writes the answer block only. If the prompt lists the classes, each one does so in another order.
- It does NOT learn to answer. NAME follows one fixed distribution, independent of the image: all names are equally
  likely, except that the first is slightly more so (13 % against 9.7 % with ten names), wherever a prompt lists it.
  Greedy decoding therefore always says the first name, and an untrained model scores exactly that class's share.

No label is used; there is no parameter for labels. GRPO alone connects the groups with the names.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
)
from transformers.utils import logging as hf_logging

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import made_once
from rft_cluster.config import ModelSection
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.family import Family
from rft_cluster.model.families.qwen2_vl import QWEN2_VL
from rft_cluster.model.folder import check_model_folder
from rft_cluster.model.numbers import FRAMES, MERGE
from rft_cluster.model.tiny.conditions import CURE, PIECES, RECIPE_VERSION, WINDOW, check_conditions
from rft_cluster.model.tiny.look_alike import group_counts
from rft_cluster.model.tiny.warm_start import Pool, warm_start
from rft_cluster.prompts import Question

ORDERS = 8  # of the listed classes, in which a prompt's length is tried
WARM_STEPS = 300  # with 200, GRPO started more slowly (digits, one seed tried)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen2-VL's chat template without its default system turn: every prompt token costs time in every forward.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ensure_tiny_model(
    cache: Path,
    *,
    images: Sequence[Image.Image],
    class_names: Sequence[str],
    question: Question,
    pixels: int,
    seed: int,
    report: Callable[[str], None] = print,
    warm_steps: int = WARM_STEPS,
    family: Family = QWEN2_VL,
) -> Path:
    """Return the folder of the tiny model for these inputs, building it in `cache` on first use.

    Args:
        images: the unlabelled pool, RGB, of any sizes, from `FEWEST` to a few thousand.
        class_names: every possible answer.
        question: of later prompts (other texts work, but badly).
        pixels: the processor resizes every image to this number of pixels.

    The same inputs give the same folder, without building it again.

    Raises:
        UserError: there are too few images; class names are missing, empty, repeated or cannot be one token; the
            question lists them so that they are not one token each; or `pixels` is less than one merged patch.
    """
    if not class_names or not all(class_names) or len(set(class_names)) != len(class_names):
        raise UserError("class names must be given, not empty, and all different")
    check_conditions(len(images), class_names)
    if pixels < family.side**2:
        raise UserError(f"pixels must be at least {family.side**2} (one merged patch), got {pixels}")
    images = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
    settings = [RECIPE_VERSION, list(class_names), question.text, pixels, seed, warm_steps]
    # Models built before there were other families and drawn orders keep their names.
    settings += [] if family is QWEN2_VL else [family.model_type]
    settings += [question.template] if question.template else []
    folder = Path(cache) / _digest(images, settings)
    if folder.exists():
        if _is_whole(folder, pixels):
            return folder
        report(f"tiny model: {folder} is damaged, so it is built anew")
        shutil.rmtree(folder)
    started = time.monotonic()
    hf_logging.disable_progress_bar()  # only a few megabytes are saved
    pool = Pool(images, len(class_names), pixels, family.side, seed)
    report(f"tiny model: {len(images)} images sorted into look-alike groups, {time.monotonic() - started:.0f} s")
    processor = _processor(
        class_names, sorted({word for pair in pool.words for word in pair}), question, pixels, family
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(processor.tokenizer, family)
        warm_start(model, processor, pool, class_names, question, warm_steps, report)
    _save(folder, model, processor, {"settings": settings, "images": len(images)})
    report(f"tiny model: built in {time.monotonic() - started:.0f} s: {folder}")
    return folder


def _save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin, made_of: dict[str, Any]) -> None:
    """Write the model in BF16. The folder gets its final name when it is complete."""
    with made_once(folder) as building:
        model.to(torch.bfloat16).save_pretrained(building)
        processor.save_pretrained(building)
        (building / "tiny.json").write_text(json.dumps(made_of, indent=1))


def _is_whole(folder: Path, pixels: int) -> bool:
    try:
        check_model_folder(folder, 0)
        PromptEncoder(str(folder), ModelSection(path=str(folder), min_pixels=pixels, max_pixels=pixels))
    except UserError:
        return False
    return True


def untrained(
    images: int, class_names: Sequence[str], question: Question, pixels: int, family: Family = QWEN2_VL
) -> tuple[Any, PreTrainedModel]:
    """An untrained model and processor of the same size as those of `ensure_tiny_model`, for checks before the build.

    Its processor has at least as many think words. Raises UserError as `ensure_tiny_model` does for the question.
    """
    coarse, fine = (min(groups, images // 4) for groups in group_counts(len(class_names)))
    words = [f"group-{number:02d}" for number in range(coarse)] + [f"kind-{number:03d}" for number in range(fine)]
    processor = _processor(class_names, words, question, pixels, family)
    return processor, build_model(processor.tokenizer, family)


def _digest(images: Sequence[Image.Image], settings: list) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for image in images:
        digest.update(str(image.size).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _processor(
    class_names: Sequence[str], words: Sequence[str], question: Question, pixels: int, family: Family
) -> Any:
    """The processor for a question, whose prompts have one length whatever the order of the classes.

    Raises:
        UserError: they have not.
    """
    listed = question.template is not None
    processor = build_processor(class_names, words, question.text, pixels, family, apart=listed)
    lengths = {len(processor.tokenizer.encode(text)) for text in question.in_some_orders(ORDERS, seed=0)}
    if len(lengths) > 1:
        raise UserError(
            f"model.path is tiny, which reads each listed class as one token, and prompt.template lists the classes so "
            f"that they cannot be told apart: put ', ' or a line end between them, {CURE}"
        )
    return processor


def build_processor(
    class_names: Sequence[str],
    words: Sequence[str],
    prompt_text: str,
    pixels: int,
    family: Family = QWEN2_VL,
    apart: bool = False,
) -> Any:
    """Make the family's processor: its own byte-level BPE, the chat template, a fixed number of pixels.

    Text is cut at tags and line ends only. The BPE is trained until every piece of the prompt, every class name and
    every think word is ONE token: short sequences make training fast on a laptop. Other text falls back to smaller
    pieces and finally to bytes, so everything encodes and decodes exactly. `apart`: text is cut at class names, too,
    for prompts that list them in any order.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            *([pre_tokenizers.Split(Regex(_any_of(class_names)), "isolated")] if apart else []),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    known = [*class_names, *words, *(" " + word for word in words), "system", "user", "assistant", "\n"]
    known += ["<think>", "</think>", "<answer>", "</answer>", prompt_text]
    trainer = trainers.BpeTrainer(
        vocab_size=1_000_000,  # in effect no limit: train until nothing is left to merge
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(known, trainer)
    return processor_around(tokenizer, pixels, pixels, family=family)


def _any_of(class_names: Sequence[str]) -> str:
    """A pattern of all class names that are not a part of a longer name or word, as `group` is of `group-01`."""
    longest_first = sorted(class_names, key=len, reverse=True)
    return rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])"


def processor_around(
    tokenizer: Tokenizer,
    min_pixels: int,
    max_pixels: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    max_tokens: int = WINDOW,
    family: Family = QWEN2_VL,
) -> Any:
    """The family's processor around a tokenizer of our own, with our chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special_tokens),
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return getattr(transformers, family.processor_class)(
        image_processor=Qwen2VLImageProcessor(
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            patch_size=family.patch,
            merge_size=MERGE,
            image_mean=family.normal[0],
            image_std=family.normal[1],
        ),
        tokenizer=fast,
        video_processor=getattr(transformers, family.video_processor_class)(),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, family: Family = QWEN2_VL) -> PreTrainedModel:
    """Make the untrained model of about a million FP32 parameters, with the tokenizer's special ids."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    width = 128
    config = getattr(transformers, family.config_class)(
        text_config=dict(
            model_type=f"{family.model_type}_text", vocab_size=len(tokenizer), hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW,
            tie_word_embeddings=True, bos_token_id=ids["<|im_start|>"], eos_token_id=ids["<|im_end|>"],
            **family.tiny_text(width),
        ),
        vision_config=dict(
            depth=3, num_heads=4, patch_size=family.patch, spatial_merge_size=MERGE, temporal_patch_size=FRAMES,
            in_channels=3, **family.tiny_vision(width),
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"], tie_word_embeddings=True,
    )  # fmt: skip
    model = getattr(transformers, family.model_class)(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
    )
    return model
