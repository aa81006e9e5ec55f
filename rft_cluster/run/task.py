"""What comes before any actor starts: the data set, the question, the model's folder, and all checks of them."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rft_cluster.classification.earnable import check_room
from rft_cluster.common.errors import UserError
from rft_cluster.common.progress import with_progress
from rft_cluster.config import Config
from rft_cluster.data import FewShotDataset, load_dataset
from rft_cluster.data.images import DECODE_ERRORS, open_image
from rft_cluster.messages import Example
from rft_cluster.prompts import PROBLEM, make_prompts, render_template

TINY_CACHE = Path("~/.cache/rft_cluster/tiny")
MAX_POOL = 2000  # images that it is built from: the graph's eigenvectors cost the cube of this (2 s at 2000)
POOL_OF_A_CLASS = 20  # below so many images a class the look-alike groups say little


@dataclass(frozen=True)
class Task:
    """What is to be learned: the few-shot data set, and `text`, the rendered question about each image."""

    dataset: FewShotDataset
    text: str

    @property
    def examples(self) -> list[Example]:
        """All labelled images, of every split."""
        return [example for split in self.dataset.splits.values() for example in split]


def prepare(config: Config) -> Task:
    """Read the data and render the template.

    Raises:
        UserError: either will not do.
    """
    dataset = load_dataset(config.data, config.run.seed)
    problem = dataset.problem if config.prompt.template == PROBLEM else None
    text = render_template(config.prompt.template, config.prompt.subject, dataset.classes, problem=problem)
    return Task(dataset, text)


def tiny_model_of(config: Config, model_path: str) -> str | None:
    """The name in the cache of the small model in `model_path`, where it is one."""
    return Path(model_path).name if config.model.path == "tiny" else None


def base_model_path(config: Config, task: Task, earlier: str | None = None) -> str:
    """The model to start from: what is configured, or the tiny one, built here if it is not yet.

    `earlier` is the name of the tiny one that a run began from. It is built from all images, so another one comes out
    where images have come or gone since.
    """
    if config.model.path != "tiny":
        return _own_model(config)
    if earlier and re.fullmatch("[0-9a-z]+", earlier) and (folder := TINY_CACHE.expanduser() / earlier).is_dir():
        return str(folder)
    from rft_cluster.model.tiny.build import ensure_tiny_model

    chosen = choose_pool(len(task.dataset.pool), config.run.seed)
    folder = ensure_tiny_model(
        TINY_CACHE.expanduser(),
        images=pool_images(task.dataset.pool, chosen, config.model.max_pixels),
        class_names=task.dataset.classes,
        prompt_text=task.text,
        pixels=config.model.max_pixels,
        seed=config.run.seed,
        report=lambda line: print(line, flush=True),
    )
    return str(folder)


def choose_pool(images: int, seed: int) -> list[int]:
    """Which images of the unlabelled pool the small model is built from: all, or `MAX_POOL` of them."""
    if images <= MAX_POOL:
        return list(range(images))
    return sorted(int(i) for i in np.random.default_rng(seed).choice(images, MAX_POOL, replace=False))


def pool_images(pool: Sequence[bytes], chosen: list[int], pixels: int) -> list[Image.Image]:
    """These images of the pool, each as small as the model will see it before the next one is read: photographs as
    cameras make them take 36 MB each. Those that cannot be decoded are left out, with a line that says how many."""
    images = []
    for index in with_progress(chosen, "reading the unlabelled pool"):
        with contextlib.suppress(*DECODE_ERRORS, Image.DecompressionBombWarning):
            images.append(open_image(pool[index], pixels=pixels))
    if len(images) < len(chosen):
        print(f"left out {len(chosen) - len(images)} of {len(chosen)} unlabelled images, which cannot be read")
    return images


def pool_note(config: Config, task: Task) -> list[str]:
    """What the small model is built from, and a warning where that is little: one text, or none for other models."""
    if config.model.path != "tiny":
        return []
    pool, shots = len(task.dataset.pool), len(task.dataset.train)
    wanted = POOL_OF_A_CLASS * len(task.dataset.classes)
    if pool >= wanted:
        return [f"the small model learns to see from a pool of {pool} unlabelled images"]
    held_out = len(task.dataset.validation) + len(task.dataset.test)
    lower = f" or lower data.test and data.validation, which hold out {held_out}," if held_out else ""
    return [
        f"the small model learns to see from a pool of {pool} unlabelled images, {shots} of them the shots: it will "
        f"see little. Add images{lower} until the pool has {wanted}"
    ]


def room_for_answers(config: Config, task: Task, count: Callable[[str], int]) -> list[str]:
    """Notes on right answers that are too long for `sampling.max_tokens` (see `check_room`); `count` counts tokens.

    Raises:
        UserError: all are, and `scoring.red_team` says to refuse that.
    """
    if config.scoring.red_team == "off":
        return []
    aliases = {example.label: example.aliases for example in task.dataset.train}
    try:
        return check_room(task.dataset.classes, aliases, config.rewards, task.text, config.sampling.max_tokens, count)
    except UserError as error:
        if config.scoring.red_team == "refuse":
            raise
        return [str(error)]


def _own_model(config: Config) -> str:
    """A folder, wherever all actors are on this machine: of a hub's model the one in the cache, so that not every actor
    asks the hub. On a cluster each node has a cache of its own."""
    from rft_cluster.model.hub import fetch_weights, find_model

    if config.cluster.joins:
        return config.model.path
    model = find_model(config.model.path)
    return str(fetch_weights(config.model.path) if model.missing else model.folder)


def check_model(config: Config, task: Task, model_path: str, examples: list[Example]) -> None:
    """Refuse a model that cannot be asked this question about every one of `examples`.

    Raises:
        UserError: it is no whole Qwen2-VL, a prompt is too long, or no right answer fits into `sampling.max_tokens`.
    """
    from rft_cluster.model.hub import check_files, find_model

    model = find_model(model_path)
    check_files(model, config.max_model_tokens)
    longest, notes = ask_model(config, task, str(model.folder), examples)
    print("\n".join([longest, *notes]), flush=True)


def ask_model(config: Config, task: Task, folder: str, examples: list[Example]) -> tuple[str, list[str]]:
    """Can the model in `folder` be asked about every one of `examples`, and write a right answer? For people: a line on
    the longest prompt, and notes on answers that are too long.

    Raises:
        UserError: its tokenizer, processor or chat template will not do, a prompt is too long, or no answer fits.
    """
    from rft_cluster.model.encoder import PromptEncoder  # imports transformers, which takes seconds

    model = config.model
    encoder = PromptEncoder(folder, model.min_pixels, model.max_pixels, model.trust_remote_code)
    notes = room_for_answers(config, task, lambda text: len(encoder.tokenizer(text)["input_ids"]))
    prompts = make_prompts(examples, task.text, "check", 0, config.run.seed)
    longest = encoder.check_lengths(prompts, model.max_prompt_tokens)
    return f"prompts     {longest} tokens at most, of {model.max_prompt_tokens}", notes
