"""May a run go on, and from where?"""

import json
from pathlib import Path

import yaml

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config
from rft_cluster.data.manifest import check_manifest, read_manifest
from rft_cluster.prompts import text_hash
from rft_cluster.run.folder import latest_checkpoint
from rft_cluster.run.task import Task

# These say where and how a run runs, not what it computes: they may change when it is resumed.
MAY_CHANGE = ("cluster", "generators", "learners", "scoring")


def first_step_of(config: Config, task: Task, resume: bool) -> tuple[int, Path | None]:
    """The step to begin with and the checkpoint to begin from, before anything is written.

    Raises:
        UserError: the run folder exists and is not to be resumed, or holds a run of another configuration, of other
            images, or with another prompt.
    """
    folder = config.run_folder
    if not folder.exists():
        return 0, None
    if not resume:
        raise UserError(f"{folder} exists: add --resume to go on with that run, or choose another run.name")
    saved_file = folder / "config.yaml"
    if saved_file.is_file():
        saved, ours = yaml.safe_load(saved_file.read_text()), config.model_dump(mode="json")
        for section in ours:
            # A run may move to another folder; another seed would draw other images.
            then, now = (part["seed"] if section == "run" else part for part in (saved.get(section), ours[section]))
            if section not in MAY_CHANGE and then != now:
                name = "run.seed" if section == "run" else section
                raise UserError(f"{folder} was begun with another configuration: {name} was {then}, and is {now} now")
    if (folder / "manifest.json").is_file():
        check_manifest(task.dataset, read_manifest(folder / "manifest.json"))
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return 0, None
    state = json.loads((checkpoint / "state.json").read_text())
    if state["prompt_sha256"] != text_hash(task.text):
        raise UserError(f"{folder} was begun with another prompt: the template's text has changed since")
    return state["step"], checkpoint
