"""The task of a run: its data set, its question, its model, and the checks of them before any actor starts."""

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rft_cluster.classification.earnable import check_room
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import made_once
from rft_cluster.common.progress import with_progress
from rft_cluster.config import AlsoSection, Config
from rft_cluster.data import FewShotDataset, load_dataset
from rft_cluster.data.images import DECODE_ERRORS, open_image
from rft_cluster.data.manifest import OtherData
from rft_cluster.messages import Example
from rft_cluster.model.families.family import Family
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.folder import read_family
from rft_cluster.model.image_size import PromptLength, view_of
from rft_cluster.prompts import PROBLEM, Question, asks_for_thinking, make_prompts, make_question
from rft_cluster.run.inside import runs_inside
from rft_cluster.run.second_look import with_room
from rft_cluster.run.targets import check_targets

TINY_CACHE = Path("~/.cache/rft_cluster/tiny")
MAX_POOL = 2000  # images for the tiny model; the graph's eigenvectors cost the cube of this (2 s at 2000)
ORDERS = 16  # of the listed classes, in which a prompt's length is tried
POOL_OF_A_CLASS = 20  # with fewer images a class the look-alike groups mean little


@dataclass(frozen=True)
class Task:
    """The few-shot data set, and the question about each image.

    `also`: those of `evaluation.also`. `options`: by example id, the classes that training's prompts list; None: all
    that are trained.
    """

    dataset: FewShotDataset
    question: Question
    also: "Task | None" = None
    options: Mapping[str, tuple[str, ...]] | None = None

    @property
    def text(self) -> str:
        """The question with the classes, if it lists them, in the data set's order."""
        return self.question.text

    @property
    def examples(self) -> list[Example]:
        """All labelled images, of every split."""
        return [example for split in self.dataset.splits.values() for example in split]

    @property
    def notes(self) -> list[str]:
        """Notes on both data sets, for people."""
        also = self.also.dataset.notes() if self.also else []
        return [*self.dataset.notes(), *(f"also        {note}" for note in also)]

    @property
    def images(self) -> Mapping[str, bytes]:
        """The encoded images of both data sets, by SHA-256."""
        return {**self.also.dataset.images, **self.dataset.images} if self.also else self.dataset.images


def prepare(config: Config, export: Path | None = None) -> Task:
    """Read the data, in the size at which the model looks at images, and render the template.

    `export`: the folder of the model, if it is not the one that the run starts from.

    Raises:
        UserError: the data or the template is unusable, or the model is of no known family.
    """
    family = read_family(export) if export else family_of_model(config)
    view = view_of(*config.model.pixels(family.side), family.side)
    dataset = load_dataset(config.data, config.run.seed, view)
    return Task(dataset, question(config, dataset))


def prepare_run(config: Config) -> Task:
    """As `prepare`, with the task of `evaluation.also`: what a training run reads."""
    return replace(prepare(config), also=prepare_also(config))


def prepare_also(config: Config) -> Task | None:
    """Read `evaluation.also`, and render its question; None if there is none. Raises as `prepare`."""
    section = config.evaluation.also
    if section is None:
        return None
    side = family_of_model(config).side
    try:
        dataset = load_dataset(section, config.run.seed, view_of(*config.model.pixels(side), side))
        return task_of_also(config, section, dataset)
    except OtherData:
        raise
    except UserError as error:
        keys = "|".join(type(section).model_fields)
        own = re.sub(rf"(?<![\w/.-])data\.(?=(?:{keys})\b)", "evaluation.also.", str(error))  # not inside a path
        raise type(error)(own if own.startswith("evaluation.also") else f"evaluation.also: {own}") from error


def task_of_also(config: Config, section: AlsoSection, dataset: FewShotDataset) -> Task:
    """`dataset` with the run's template, its own subject and its own classes. Raises UserError if that is unusable."""
    problem = dataset.problem if config.prompt.template == PROBLEM else None
    return Task(dataset, make_question(config.prompt.template, section.subject, dataset.classes, problem))


def question(config: Config, dataset: FewShotDataset) -> Question:
    """The question of the template. Raises UserError if it is unusable."""
    problem = dataset.problem if config.prompt.template == PROBLEM else None
    return make_question(config.prompt.template, config.prompt.subject, dataset.classes, problem, dataset.unseen)


def with_classes_listed(config: Config, task: Task) -> tuple[Config, Task]:
    """The configuration and the task with the question that lists the classes and asks for the answer alone. A run's
    own limit of tokens may leave no room for the list."""
    closed = config.model_copy(update={"prompt": config.prompt.model_copy(update={"template": "closed"})})
    asked = Task(task.dataset, question(closed, task.dataset))
    if asked.text == task.text:  # there is room for that already
        return closed, asked
    return with_room(closed, asked.text), asked


def tiny_model_of(config: Config, model_path: str) -> str | None:
    """The cache name of the tiny model in `model_path`; None for other models."""
    return Path(model_path).name if config.model.path == "tiny" else None


def _beside_runs(config: Config) -> Path:
    """Where a run on a cluster keeps its tiny model: on the disk that all nodes share for runs."""
    return config.run.folder.absolute() / ".tiny"


def _for_all_nodes(config: Config, folder: Path) -> Path:
    """The tiny model in `folder`, or, on a cluster, a copy that all nodes see."""
    beside = _beside_runs(config)
    if not config.cluster.joins or folder.parent == beside:
        return folder
    copy = beside / folder.name
    if not (copy / "config.json").is_file():
        shutil.rmtree(copy, ignore_errors=True)
        with made_once(copy) as part:
            for file in folder.iterdir():  # not copytree, whose error has no number
                shutil.copy(file, part / file.name)
    return copy


def base_model_path(config: Config, task: Task, earlier: str | None = None) -> str:
    """The folder of the model to start from: the configured one, or the tiny model, built here if necessary.

    `earlier`: cache name of the tiny model that a resumed run started from. It must be reused: a rebuilt one would
    differ if images were added or removed since.
    """
    if config.model.path != "tiny":
        return _own_model(config)
    cache = TINY_CACHE.expanduser()
    if earlier and re.fullmatch("[0-9a-z]+", earlier):
        for place in (_beside_runs(config), cache):
            if (place / earlier / "config.json").is_file():
                return str(_for_all_nodes(config, place / earlier))
        print(
            f"WARNING: the small model that this run started from, {earlier}, is neither in {cache} nor beside the "
            f"runs: it is built anew, and may differ from that one where the processor does, or the pool of images",
            flush=True,
        )
    from rft_cluster.model.tiny.build import ensure_tiny_model

    chosen = choose_pool(len(task.dataset.pool), config.run.seed)
    family = tiny_family(config)
    _, pixels = config.model.pixels(family.side)
    folder = ensure_tiny_model(
        cache,
        images=pool_images(task.dataset.pool, chosen, pixels),
        class_names=task.dataset.classes,
        question=task.question,
        pixels=pixels,
        seed=config.run.seed,
        report=lambda line: print(line, flush=True),
        family=family,
    )
    return str(_for_all_nodes(config, folder))


def tiny_family(config: Config) -> Family:
    """The family of the tiny model."""
    return FAMILIES[config.model.family or "qwen2_vl"]


def family_of_model(config: Config) -> Family:
    """The family of the model that a run starts from.

    Raises:
        UserError: the model cannot be found, or is of no known family.
    """
    from rft_cluster.model.hub import find_model

    return tiny_family(config) if config.model.path == "tiny" else read_family(find_model(config.model.path).folder)


def image_pixels(config: Config) -> tuple[int, int]:
    """The fewest and the most pixels at which the model of a run looks at an image. Raises as `family_of_model`."""
    return config.model.pixels(family_of_model(config).side)


def choose_pool(images: int, seed: int) -> list[int]:
    """Indices of the pool images for the tiny model: all, or a random `MAX_POOL` of them."""
    if images <= MAX_POOL:
        return list(range(images))
    return sorted(int(i) for i in np.random.default_rng(seed).choice(images, MAX_POOL, replace=False))


def pool_images(pool: Sequence[bytes], chosen: list[int], pixels: int) -> list[Image.Image]:
    """Read the chosen images of the pool, each scaled down to the model's size before the next one is read.

    A photograph of 12 megapixels takes 36 MB. Images that cannot be decoded are left out; a line says how many.
    """
    images = []
    for index in with_progress(chosen, "reading the unlabelled pool"):
        with contextlib.suppress(*DECODE_ERRORS, Image.DecompressionBombWarning):
            images.append(open_image(pool[index], pixels=pixels))
    if len(images) < len(chosen):
        print(f"left out {len(chosen) - len(images)} of {len(chosen)} unlabelled images, which cannot be read")
    return images


def pool_note(config: Config, task: Task) -> list[str]:
    """A note on the images for the tiny model, with a warning if they are few; empty for other models."""
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


def room_for_answers(config: Config, task: Task, count: Callable[[str], int], training: bool = True) -> list[str]:
    """Notes on right answers that are too long for `sampling.max_tokens` (see `check_room`). `count` counts tokens.

    Answers that are not trained are judged by the label alone, whatever the rewards.

    Raises:
        UserError: all are too long, and `scoring.red_team` is refuse.
    """
    if config.scoring.red_team == "off":
        return []
    aliases = {example.label: example.aliases for example in task.dataset.train}
    rewards = config.rewards if training else ("accuracy",)
    try:
        return check_room(task.dataset.classes, aliases, rewards, task.text, config.sampling.max_tokens, count)
    except UserError as error:
        if config.scoring.red_team == "refuse":
            raise
        return [str(error)]


def _own_model(config: Config) -> str:
    """The model's folder if all actors run on this machine, so that not every actor asks the hub; else its hub name.

    On a cluster each node has its own cache.
    """
    from rft_cluster.model.hub import whole_model

    return config.model.path if config.cluster.joins else str(whole_model(config.model.path))


def check_words(task: Task) -> None:
    """Check that the tiny model knows the words of `task.also`.

    Raises:
        UserError: it does not: any figure would be 0, before and after.
    """
    if task.also is None:
        return
    known, also = task.dataset.classes, task.also
    unknown = [label for label in also.dataset.classes if label not in known]
    if unknown or task.question.listing(also.dataset.classes) != also.text:
        asked = "another question (set evaluation.also.subject as prompt.subject)"
        what = f"the class {unknown[0]!r}" if unknown else asked
        raise UserError(
            f"model.path is tiny, which knows the words of its own question and classes alone, and evaluation.also has "
            f"{what}: leave it out, or set model.path to a trained Qwen2-VL"
        )


def check_model(config: Config, task: Task, model_path: str, examples: list[Example]) -> None:
    """Check that a model can be asked the question about each of `examples`, for an evaluation.

    Raises:
        UserError: the model is not complete or of no known family, a prompt is too long, or no answer fits into
            `sampling.max_tokens`.
    """
    from rft_cluster.model.hub import check_files, find_model

    model = find_model(model_path)
    check_files(model, config.max_model_tokens)
    asked = ask_model(config, task, str(model.folder), examples, training=False)
    print("\n".join(asked.notes), flush=True)


@dataclass(frozen=True)
class Asked:
    """What the tokenizer says about a task: `lengths` of the prompts, in the order of the examples, and notes."""

    lengths: list[PromptLength]
    notes: list[str]


def ask_model(config: Config, task: Task, folder: str, examples: list[Example], training: bool = True) -> Asked:
    """Check prompts and answers with the tokenizer in `folder`. `training`: the task is trained, and not only asked.

    Raises:
        UserError: tokenizer, processor or chat template are unusable, a prompt is too long, or no answer fits. Of a
            task that is trained also: SFT, perhaps of a run inside, would teach an answer that does not fit; or the
            chat template opens `<think>`, the question asks for the answer alone, and `format` is a reward.
    """
    from rft_cluster.model.encoder import PromptEncoder  # imports transformers, which takes seconds

    model = config.model
    encoder = PromptEncoder(folder, model)
    if training and encoder.opening and "format" in config.rewards and not asks_for_thinking(task.text):
        raise UserError(
            f"prompt.template: {config.prompt.template} asks for the answer alone, but the chat template in {folder} "
            f"opens <think> in the prompt, so no completion could have the format: take prompt.template=think_answer "
            f"or with_labels, or the model's Instruct variant"
        )

    def count(text: str) -> int:
        return len(encoder.tokenizer(text)["input_ids"])

    opening = encoder.opening.strip()
    notes = room_for_answers(config, task, lambda text: count(text.removeprefix(opening)), training)
    # Tokens may depend on the order in which classes are listed: the longest of a few orders counts for all.
    longest_text = max(task.question.in_some_orders(ORDERS, config.run.seed), key=count)
    prompts = make_prompts(examples, longest_text, "check", 0, config.run.seed)
    lengths = encoder.check_lengths(prompts, task.dataset.images, model.max_prompt_tokens)
    longest = max(length.tokens for length in lengths)
    sft = [one for one in (config, *runs_inside(config)) if not one.algorithm.samples] if training else []
    if sft:  # all of them teach the same answers
        trained = [label for label in task.dataset.classes if label not in task.dataset.unseen]
        notes.append(check_targets(sft[0], encoder, task.text, trained))
    pixels = [f"note        {note}"] if (note := model.pixels_note(encoder.side)) else []
    return Asked(lengths, [f"prompts     {longest} tokens at most, of {model.max_prompt_tokens}", *pixels, *notes])
