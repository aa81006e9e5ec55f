"""The warm start of GRPO: some steps of SFT before it (`schedule.warm_start`), kept only if validation images agree.

The SFT is a run of its own in RUN/warm_start/, and its exported model is what GRPO starts from. So the reference of the
KL, checkpoints, the journal and resuming are those of any run that starts from a model.
"""

from rft_cluster.classification.report import Judged
from rft_cluster.common.files import write_json
from rft_cluster.config import Config
from rft_cluster.run.answers import read_answers, write_answers
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.inside import WARM_START_FILE, WarmStart, warm_start_run
from rft_cluster.run.resume import is_run
from rft_cluster.run.saving import MODEL
from rft_cluster.run.task import Task
from rft_cluster.training import greedy_answers, train_inside


def warm_started(config: Config, task: Task, model_path: str, tiny_model: str | None) -> str:
    """The model that GRPO starts from: the warm-started one if more validation images are answered right after it than
    before. Else, and without a warm start, that of `model_path`. Says which, and records it.

    What was done before a run was stopped is not done again. `tiny_model`: see `run.checkpoints.State`.
    """
    if config.schedule.warm_start is None:
        return model_path
    if not is_run(config.run_folder):
        RunFolder(config, task, 0, tiny_model)  # a run that is stopped in its warm start goes on with the same images
    own = warm_start_run(config)
    steps = own.schedule.steps
    print(f"warm start: {steps} steps of SFT, in {own.run_folder}", flush=True)
    train_inside(own, task, model_path)
    before = _before(own, task, model_path)
    after = read_answers(own.run_folder, steps, "validation")
    was, now = (sum(one.strict for one in side) / len(side) for side in (before, after))
    is_kept = now > was
    record = WarmStart(steps=steps, kept=is_kept, validation=(was, now), images=len(after))
    write_json(config.run_folder / WARM_START_FILE, record.model_dump(mode="json"))
    print(record.described(), flush=True)
    return str((own.run_folder / MODEL).absolute()) if is_kept else model_path


def _before(own: Config, task: Task, model_path: str) -> list[Judged]:
    """The untouched model's answers to the validation images, asked once and recorded beside those after SFT."""
    if not (judged := read_answers(own.run_folder, 0, "validation")):
        print("warm start: the untouched model is asked about the validation images", flush=True)
        judged = greedy_answers(own, task, model_path, task.dataset.validation, "validation")
        write_answers(own.run_folder, 0, "validation", judged)
    return judged
