"""Checks before Ray starts. `--dry-run` and a run make the same calls.

model = check_paths(config)                     within a second: no heavy import, no picture read
task = prepare(config)
for line in check_task(config, task, model): print(line)
"""

import tempfile
from dataclasses import dataclass

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import bytes_in, check_home, check_space, check_writable, size
from rft_cluster.config import Config
from rft_cluster.data.manifest import read_manifest
from rft_cluster.model.folder import check_model_config, check_parallel, check_window
from rft_cluster.model.hub import Model, check_files, find_model
from rft_cluster.model.tiny.conditions import check_conditions
from rft_cluster.prompts import PROBLEM, find_template
from rft_cluster.run.saving import BEST, MODEL
from rft_cluster.run.task import TINY_CACHE, Task, ask_model, pool_note

EXPORT, MASTER, MOMENTS = 2, 4, 8  # bytes a parameter on disk: BF16, FP32, two in FP32
RECORDS = 50 * 10**6  # bytes for a run's other files


@dataclass(frozen=True)
class Checked:
    """Results of the checks: the model's number of parameters, and lines for the user."""

    parameters: int
    notes: list[str]


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
        UserError: the template, the manifest or the model is missing or unusable.
    """
    check_home()
    if config.prompt.template != PROBLEM:
        find_template(config.prompt.template)
    if config.data.manifest:
        read_manifest(config.data.manifest)
    if model_path == "tiny":
        check_writable(TINY_CACHE.expanduser(), "The small model is kept there: set HOME to a folder that can be")
        return None
    model = find_model(model_path)
    check_files(model, config.max_model_tokens)
    check_parallel(check_model_config(model.folder, config.max_model_tokens), int(config.generators.gpus))
    return model


def check_task(config: Config, task: Task, model: Model | None) -> Checked:
    """Check that the model can be asked about every image and can write a right answer, and that the disk has room.

    Raises:
        UserError: one of these fails.
    """
    if model is None:
        parameters, (longest, notes) = _check_tiny(config, task)
    else:
        parameters = check_files(model, config.max_model_tokens)
        longest, notes = ask_model(config, task, str(model.folder), task.examples)
        notes = [*filter(None, [model.note]), *notes]
    return Checked(parameters, [longest, *notes, *pool_note(config, task), check_disk(config, parameters)])


def check_disk(config: Config, parameters: int) -> str:
    """Check that the disk has room for the run's checkpoints and models. Returns a line for the user.

    Files of an earlier part of the run will be overwritten, so their space counts as free.

    Raises:
        UserError: there is not enough room.
    """
    # With LoRA a checkpoint has the base in BF16, and adapters of negligible size.
    checkpoint = (EXPORT if config.model.lora else MASTER + MOMENTS) * parameters
    needed = checkpoint * (config.schedule.keep_checkpoints + 1) + 3 * EXPORT * parameters + RECORDS
    held = sum(bytes_in(config.run_folder / part) for part in ("checkpoints", MODEL, BEST))
    check_space(
        config.run_folder,
        max(0, needed - held),
        f"checkpoints and models of {parameters / 10**6:.1f} million parameters",
        "Free some, lower schedule.keep_checkpoints, or set run.folder to another disk",
    )
    return f"disk        {size(needed)} for checkpoints and models in {config.run_folder}"


def _check_tiny(config: Config, task: Task) -> tuple[int, tuple[str, list[str]]]:
    """Check the tiny model before it is built. Returns its number of parameters, and the result of `ask_model`."""
    dataset = task.dataset
    check_conditions(len(dataset.pool), dataset.classes)
    from rft_cluster.model.tiny.build import untrained

    processor, model = untrained(len(dataset.pool), dataset.classes, task.text, config.model.max_pixels)
    check_window(model.config.text_config.max_position_embeddings, config.max_model_tokens, "the small model")
    with tempfile.TemporaryDirectory(prefix="rft_cluster_") as folder:
        processor.save_pretrained(folder)
        return model.num_parameters(), ask_model(config, task, folder, task.examples)
