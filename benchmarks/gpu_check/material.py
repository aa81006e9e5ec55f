"""What the tiers compute with: random weights, made-up images, prompts and completions. Nothing is downloaded.

size "true"   Qwen2-VL-2B's shapes (`benchmarks/qwen2_vl_2b.json`), images of 401,408 pixels, completions of 64 tokens
size "tiny"   the same architecture with a million parameters, images of 56 x 56, completions of 12 tokens
a model_type  another family's architecture with a million parameters, images that Qwen2.5-VL sees in several windows
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.common import in_a_process
from benchmarks.gpu_check.checklist import Bench
from benchmarks.models import (
    TRANSFER_QUESTION,
    TRUE_TOKENS,
    family_model,
    transfer_model,
    true_model,
    true_question,
)
from benchmarks.true_shapes import image_size, noise_image
from rft_cluster.algorithm import load_algorithm
from rft_cluster.common.files import unfinished
from rft_cluster.config import Config, load_config
from rft_cluster.data.images import image_sha256
from rft_cluster.messages import Completion, Example, Group, ImageRef, Prompt, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.families.qwen2_vl import QWEN2_VL

ON_CPU = ("cluster.device=cpu", "learners.gpus=0", "learners.cpus=1", "generators.gpus=0", "generators.cpus=1")


@dataclass(frozen=True)
class Size:
    """`image`: width, height. `image_tokens`: the fewest and the most. `tokens`: of the longest completion. `question`:
    the text of the prompts."""

    image: tuple[int, int]
    image_tokens: tuple[int, int]
    tokens: int
    question: str


SIZES = {
    "true": Size(image_size(QWEN2_VL), TRUE_TOKENS, 64, true_question()),
    "tiny": Size((56, 56), (4, 4), 12, TRANSFER_QUESTION),
}
OTHERS = {name: family for name, family in FAMILIES.items() if name != "qwen2_vl"}
SIZES |= dict.fromkeys(OTHERS, Size((236, 301), (64, 100), 12, TRANSFER_QUESTION))


def model_folder(bench: Bench) -> Path:
    """The folder of the model, made on first use: 4.4 GB at true size."""
    if bench.size == "tiny":
        return transfer_model(bench.folder, "tiny")
    folder = bench.folder / f"model-{bench.size}"
    if folder.exists():
        return folder
    with unfinished(folder) as building:
        if bench.size in OTHERS:
            family = OTHERS[bench.size]
            family_model(building, family, SIZES[bench.size].image_tokens[1] * family.side**2)
        else:
            # In a process of its own: with this one 5 GiB of a GPU would stay, and the run of `shared` needs 70 of 79.
            in_a_process(true_model, building, bench.device, environment={})
    return folder


def run_config(bench: Bench, *changes: str, name: str = "flower102_1gpu") -> Config:
    """The configuration of a run with that model; on a CPU without GPUs. `changes`: "section.key=value"."""
    size = SIZES[bench.size]
    low, high = size.image_tokens
    return load_config(name, [
        f"model.path={model_folder(bench)}", f"model.min_image_tokens={low}", f"model.max_image_tokens={high}",
        f"sampling.max_tokens={size.tokens}", *(ON_CPU if bench.device == "cpu" else ()), *changes,
    ])  # fmt: skip


@cache
def images(bench: Bench, count: int) -> dict[str, bytes]:
    """Pictures of noise, all different, by SHA-256."""
    made = [noise_image(SIZES[bench.size].image, seed) for seed in range(count)]
    return {image_sha256(image): image for image in made}


def prompts(bench: Bench, count: int) -> list[Prompt]:
    """The size's question about each of `images(bench, count)`."""
    question = SIZES[bench.size].question
    return [
        Prompt(f"train/0/{i}", Example(ImageRef(f"noise/{i}", sha256), "rose"), question, i)
        for i, sha256 in enumerate(images(bench, count))
    ]


def samples(bench: Bench, config: Config, groups: int) -> list[TrainingSample]:
    """Training samples of `groups` prompts: random completions of unequal lengths, random advantages."""
    draw = torch.Generator().manual_seed(0)
    encoder = PromptEncoder(config.model.path, config.model)
    never = {*encoder.forbidden_token_ids, *encoder.stop_token_ids}
    usual = torch.tensor([token for token in range(len(encoder.tokenizer)) if token not in never])
    longest, group_size = SIZES[bench.size].tokens, config.sampling.group_size
    lengths = [longest - i % 3 for i in range(group_size)]
    pictures = images(bench, groups)

    def completion(length: int) -> Completion:
        tokens = usual[torch.randint(len(usual), (length,), generator=draw)].tolist()
        return Completion(tokens, [-math.log(len(usual))] * length, "", "stop", 0)  # about that of noise

    made = [
        Group(prompt, encoder.encode(prompt.text, pictures[prompt.example.image.sha256]).token_ids,
              [completion(length) for length in lengths])
        for prompt in prompts(bench, groups)
    ]  # fmt: skip
    advantages = [torch.randn(group_size, generator=draw).tolist() for _ in made]
    return load_algorithm(config).samples(made, advantages)
