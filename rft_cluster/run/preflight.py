"""What a launch would refuse is refused here, before Ray starts: `--dry-run` and a run go through the same calls.

model = check_paths(config)                     within a second: nothing heavy is imported, no picture read
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

EXPORT, MASTER, MOMENTS = 2, 4, 8  # bytes a parameter takes on disk: BF16, FP32, two of FP32
RECORDS = 50 * 10**6  # bytes for what else a run writes


@dataclass(frozen=True)
class Checked:
    """What the checks have found: the model's number of parameters, and lines for people."""

    parameters: int
    notes: list[str]


def check_run_folder(config: Config) -> None:
    """Raises UserError where the run's folder is not there and cannot be made, cannot be written, or lies among the
    classes' folders."""
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
    """Everything that is named and quick to look at. Returns the model of `model_path`, None for `tiny`.

    Raises:
        UserError: the template, the manifest or the model is not there or will not do.
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
    """The model against the task: can it be asked about every image, and write a right answer; is there room on disk?

    Raises:
        UserError: something of that is not so.
    """
    if model is None:
        parameters, (longest, notes) = _check_tiny(config, task)
    else:
        parameters = check_files(model, config.max_model_tokens)
        longest, notes = ask_model(config, task, str(model.folder), task.examples)
        notes = [*filter(None, [model.note]), *notes]
    return Checked(parameters, [longest, *notes, *pool_note(config, task), check_disk(config, parameters)])


def check_disk(config: Config, parameters: int) -> str:
    """Is there room for a run's checkpoints and models? What an earlier part of the run left there is written over.

    Raises:
        UserError: there is not.
    """
    # Of LoRA a checkpoint holds the base in BF16, and adapters that are small beside it.
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
    """Of the small model that is yet to be built: its number of parameters, and what `ask_model` says."""
    dataset = task.dataset
    check_conditions(len(dataset.pool), dataset.classes)
    from rft_cluster.model.tiny.build import untrained

    processor, model = untrained(len(dataset.pool), dataset.classes, task.text, config.model.max_pixels)
    check_window(model.config.text_config.max_position_embeddings, config.max_model_tokens, "the small model")
    with tempfile.TemporaryDirectory(prefix="rft_cluster_") as folder:
        processor.save_pretrained(folder)
        return model.num_parameters(), ask_model(config, task, folder, task.examples)
