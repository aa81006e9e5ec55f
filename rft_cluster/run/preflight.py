"""Checks before Ray starts. `--dry-run` and a run make the same calls.

model = check_paths(config, config.model.path)     within a second: no heavy import, no picture read
task = prepare_run(config)
for line in check_task(config, task, model).notes: print(line)
"""

import tempfile
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path

from rft_cluster.classification.probabilities import FEWEST
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import ROOM, bytes_in, check_home, check_space, check_writable, size
from rft_cluster.config import Config, PromptSection
from rft_cluster.data.flower102 import takes_official
from rft_cluster.data.manifest import read_manifest
from rft_cluster.data.official import bytes_to_download
from rft_cluster.model.folder import check_encoder, check_model_config, check_parallel, check_window, read_shapes
from rft_cluster.model.hub import Model, check_files, find_model
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.model.tiny.conditions import check_conditions
from rft_cluster.prompts import PROBLEM, asks_for_thinking, find_template
from rft_cluster.run.answers import ALSO
from rft_cluster.run.inside import runs_inside, usual_sft_rate
from rft_cluster.run.resume import read_saved_config
from rft_cluster.run.saving import BEST, MODEL
from rft_cluster.run.space import disk_bytes
from rft_cluster.run.task import (
    TINY_CACHE,
    Asked,
    Task,
    ask_model,
    check_words,
    pool_note,
    tiny_family,
    with_classes_listed,
)


@dataclass(frozen=True)
class Checked:
    """Results of the checks: the model's number of parameters and sizes, each split's prompts, lines for the user."""

    parameters: int
    shapes: Shapes
    prompts: dict[str, list[PromptLength]]
    notes: list[str]


LEAST_START = 30.0  # seconds; a host that cannot be reached is named after 20


def check_deadlines(config: Config) -> None:
    """Check that deadlines do not contradict each other: an actor must not count as lost while it does what it may.

    Not a part of the configuration's own rules, by which records of older versions are read, too.

    Raises:
        UserError: they do; the message has the values and the keys.
    """
    scoring, start, most = config.scoring, config.cluster.start_timeout, config.cluster.step_timeout
    if start < LEAST_START:
        raise UserError(
            f"cluster.start_timeout is {start:g} s, and an actor needs longer: set it to {LEAST_START:g} or more"
        )
    if any("." in name or ":" in name for name in config.rewards):
        needed = scoring.load_limit + scoring.time_limit
        if needed >= most:
            raise UserError(
                f"cluster.step_timeout is {most:g} s, but the reward actor may take scoring.load_limit "
                f"({scoring.load_limit:g} s) and scoring.time_limit ({scoring.time_limit:g} s): it would count as "
                f"lost. Raise cluster.step_timeout above {needed:g}, or lower the others"
            )


def check_unread(config: Config) -> None:
    """Check that no key is set that nothing in the run reads: the value would do nothing, and nobody would say so.

    Not a part of the configuration's own rules either. A run that goes on may keep what it was begun with.

    Raises:
        UserError: one is; the message has the value and what would read it.
    """
    begun = config.run_folder / "config.yaml"
    for key, cure in _unread(config).items():
        value = attrgetter(key)(config)
        if not (begun.is_file() and attrgetter(key)(read_saved_config(begun)) == value):
            raise UserError(f"{key} is {value}, but nothing in this run reads it: {cure}, or leave {key} out")


def _unread(config: Config) -> dict[str, str]:
    """The keys that are set and not read, each with what to do."""
    found = {}
    if config.evaluation.encoder is not None and "encoder" not in config.baselines:
        found["evaluation.encoder"] = "add encoder to baselines"
    if config.prompt.top_k != PromptSection().top_k and config.prompt.options == "all":
        found["prompt.top_k"] = "set prompt.options=own_top_k"
    if config.optimizer.sft_learning_rate is not None and not runs_inside(config):
        inside = "add sft to baselines, or set schedule.warm_start"
        found["optimizer.sft_learning_rate"] = inside if config.algorithm.samples else "set optimizer.learning_rate"
    return found


def check_run_folder(config: Config) -> None:
    """Raise UserError if the run's folder cannot be created or written, or lies among the classes' folders."""
    check_writable(config.run_folder, "Set run.folder to a folder that can be")
    if config.data.source != "folder" or config.data.path is None:
        return
    data, run = config.data.path.resolve(), config.run_folder.resolve()
    if run.is_relative_to(data):
        raise UserError(
            f"run.folder: {config.run_folder} lies in data.path ({config.data.path}), where it would be taken for a "
            f"class: set run.folder to a folder elsewhere, or data.path to the one with the classes"
        )


def check_paths(config: Config, model_path: str) -> Model | None:
    """Check all files that the configuration names, quickly. Returns the model of `model_path`, None for `tiny`.

    Raises:
        UserError: the template, the manifest or the model is missing or unusable, or the official Flower102 archive is
            neither in the cache nor to be had.
    """
    check_home()
    if config.prompt.template != PROBLEM:
        find_template(config.prompt.template)
    if config.data.manifest:
        read_manifest(config.data.manifest)
    if takes_official(config.data):
        bytes_to_download()  # asks the server now, not after minutes
    if model_path == "tiny":
        check_writable(TINY_CACHE.expanduser(), "The small model is kept there: set HOME to a folder that can be")
        return None
    model = find_model(model_path)
    check_files(model, config.max_model_tokens)
    check_parallel(check_model_config(model.folder, config.max_model_tokens), int(config.generators.gpus))
    return model


def check_task(config: Config, task: Task, model: Model | None, training: bool = True) -> Checked:
    """Check that the model can be asked about every image and can write a right answer.

    `training`: the task is trained, and not only asked.

    Raises:
        UserError: one of these fails.
    """
    if model is None:
        parameters, shapes, asked = _check_tiny(config, task, training)
        origin = ""
    else:
        parameters = check_files(model, config.max_model_tokens)
        shapes = read_shapes(model.folder)
        asked = _asked(config, task, str(model.folder), training)
        origin = model.note
    notes = [*filter(None, [origin]), *asked.notes, *pool_note(config, task), *calibration_note(config, task)]
    notes += sft_note(config)
    return Checked(parameters, shapes, _by_split(task, asked.lengths), notes)


def sft_note(config: Config) -> list[str]:
    """A line if SFT inside the run has GRPO's learning rate."""
    rate = usual_sft_rate(config)
    if rate is None or not runs_inside(config):
        return []
    return [
        f"note        SFT has the run's learning rate, {config.optimizer.learning_rate:g}, at which it hardly changes "
        f"a model: optimizer.sft_learning_rate={rate:g} is usual"
    ]


def calibration_note(config: Config, task: Task) -> list[str]:
    """A line if the run will end without a temperature that another key would give it; else none."""
    if config.schedule.evaluate_every or len(task.dataset.validation) < FEWEST or not asks_for_thinking(task.text):
        return []
    return [
        "note        no temperature will be fitted: the probabilities of a policy that thinks need its answers to the "
        "validation images (schedule.evaluate_every)"
    ]


def check_warm_start(config: Config, task: Task) -> None:
    """Raise UserError if nothing could say whether a warm start is to be kept."""
    if config.schedule.warm_start and not task.dataset.validation:
        raise UserError(
            "schedule.warm_start is kept only if more validation images are answered right after it, and there are "
            "none: set data.validation, or leave schedule.warm_start out"
        )


def check_baselines(config: Config, task: Task, model: Model | None) -> None:
    """Check that the baselines that the configuration asks for can be measured at the run's end.

    Raises:
        UserError: one of them cannot.
    """
    if not config.baselines:
        return
    if not task.dataset.test:
        raise UserError("baselines are compared on test images, and there are none: set data.test, or baselines=[]")
    if "encoder" in config.baselines:
        assert config.evaluation.encoder is not None, "the configuration's own rule"
        check_encoder(config.evaluation.encoder)
    if "base_closed" in config.baselines:
        try:
            check_task(*with_classes_listed(config, task), model, training=False)
        except UserError as error:
            raise UserError(f"baselines: base_closed: {error}") from error


def _asked(config: Config, task: Task, folder: str, training: bool) -> Asked:
    """What the tokenizer says about all examples of the task, followed by those of `task.also`, which is only asked."""
    asked = ask_model(config, task, folder, task.examples, training)
    if task.also is None:
        return asked
    also = ask_model(config, task.also, folder, task.also.dataset.test, training=False)
    return Asked([*asked.lengths, *also.lengths], [*asked.notes, *(f"also        {note}" for note in also.notes)])


def _by_split(task: Task, lengths: list[PromptLength]) -> dict[str, list[PromptLength]]:
    """Divide the lengths of all examples' prompts, which are in the order of the splits. Those left are of `also`."""
    ordered = iter(lengths)
    splits = {split: list(islice(ordered, len(examples))) for split, examples in task.dataset.splits.items()}
    return splits | ({ALSO: list(ordered)} if task.also else {})


def check_disk(config: Config, parameters: int) -> str:
    """Check that the disk has room for the run's checkpoints, models and journal. Returns a line for the user.

    Files of an earlier part of the run will be overwritten, so their space counts as free.

    Raises:
        UserError: there is not enough room.
    """
    needed = sum(disk_bytes(one, parameters) for one in (config, *runs_inside(config)))
    held = sum(bytes_in(config.run_folder / part) for part in ("checkpoints", "journal", MODEL, BEST))
    check_space(
        config.run_folder,
        max(0, needed - held),
        f"checkpoints and models of {parameters / 10**6:.1f} million parameters, and the journal,",
        ROOM,
    )
    return f"disk        {size(needed)} for checkpoints, models and journal in {config.run_folder}"


def _check_tiny(config: Config, task: Task, training: bool) -> tuple[int, Shapes, Asked]:
    """Check the tiny model before it is built. Returns its number of parameters and sizes, and what it was asked."""
    dataset = task.dataset
    check_conditions(len(dataset.pool), dataset.classes)
    check_words(task)
    from rft_cluster.model.tiny.build import untrained

    family = tiny_family(config)
    _, pixels = config.model.pixels(family.side)
    processor, model = untrained(len(dataset.pool), dataset.classes, task.question, pixels, family)
    check_window(model.config.text_config.max_position_embeddings, config.max_model_tokens, "the small model")
    with tempfile.TemporaryDirectory(prefix="rft_cluster_") as folder:
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        shapes = Shapes.of(model.config.to_dict(), Path(folder))
        return model.num_parameters(), shapes, _asked(config, task, folder, training)
