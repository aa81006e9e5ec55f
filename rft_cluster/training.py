"""A whole training: `train.py`'s loop, in as many parts as losses make of it, from the actors' start to their end.

A run may have another one in its folder, such as SFT on the same images, which is trained in the same way.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.report import Judged, judge
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.metrics import RunMetrics
from rft_cluster.cluster.start import start_cluster, start_generators
from rft_cluster.common.errors import ClusterError, NoRoom, UserError
from rft_cluster.common.files import write_json
from rft_cluster.config import Config
from rft_cluster.messages import Example, Sampling
from rft_cluster.prompts import make_prompts
from rft_cluster.run.checkpoints import newest_step
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.lock import locked
from rft_cluster.run.restarts import Restarts
from rft_cluster.run.resume import Start, find_start
from rft_cluster.run.saving import BASELINES_FILE, is_trained
from rft_cluster.run.targets import read_targets
from rft_cluster.run.task import Task
from rft_cluster.run.tracker import Tracker
from rft_cluster.train import train


def train_inside(config: Config, task: Task, model_path: str) -> None:
    """Train a run whose folder is inside another's, from where it was stopped; nothing if it is done.

    `task`: of the run around it, whose images it has, too.
    """
    with locked(config.run_folder):
        if not is_trained(config):
            train_through_losses(config, task, _goes_on(config), model_path, None, [])
            write_json(config.run_folder / BASELINES_FILE, {})  # it is done: the run around it has the baselines


def greedy_answers(
    config: Config, task: Task, model_path: str, examples: Sequence[Example], split: str
) -> list[Judged]:
    """The greedy answers of an untrained model to the task's question about each example, judged."""
    images = {example.image.sha256: task.dataset.image(example) for example in examples}
    prompts = make_prompts(list(examples), task.text, split, 0, config.run.seed)
    with start_generators(config, model_path, images) as generators:
        groups = generators.generate(prompts, Sampling(1, 0.0, config.sampling.max_tokens), version=0)
    reader = AnswerReader(task.dataset.classes, task.dataset.aliases)
    return [judge(group, reader) for group in groups]


def train_through_losses(
    config: Config, task: Task, start: Start, model_path: str, tiny_model: str | None, trackers: Sequence[Tracker]
) -> None:
    """Train to the last step, in as many parts as losses make of it.

    `model_path`: the model to start from. `tiny_model`: see `run.checkpoints.State`.
    """
    restarts = Restarts(config)
    targets = read_targets(config, model_path, task.dataset.images)
    metrics = RunMetrics(config.run.name, restarts.lost)
    lost = False
    while True:
        try:
            with ExitStack() as stack:
                cluster = _entered(stack, start_cluster(config, model_path, task.images, restarts.again), lost)
                stack.enter_context(metrics.exported(cluster))
                step = _restore(cluster, start)
                while True:
                    try:
                        # The folder is opened last: until all actors are ready, it stays unchanged.
                        run = RunFolder(config, task, step, tiny_model, [metrics, *trackers])
                        with run.activity.reported(cluster.doing):
                            return train(config, task, cluster, run, targets)
                    except ClusterError as error:
                        cluster.restart_learners(error)
                        saved = newest_step(config.run_folder) or 0
                        step = cluster.restore_snapshot(saved) or _restored_again(cluster, _goes_on(config))
        except ClusterError as error:
            if not restarts.again(error, "all actors start afresh"):
                raise
            start, lost = _goes_on(config), True
        except NoRoom as error:
            if not lost:
                raise
            raise ClusterError(f"what was lost finds no room: {error}") from error


def _entered(stack: ExitStack, actors: AbstractContextManager[Cluster], lost: bool) -> Cluster:
    """Start the actors. After a loss an error of the user is none: the same configuration has started before."""
    try:
        return stack.enter_context(actors)
    except NoRoom:
        raise
    except UserError as error:
        if not lost:
            raise
        raise ClusterError(f"what was lost does not start again: {error}") from error


def _restore(cluster: Cluster, start: Start) -> int:
    """Bring the learners to the checkpoint of `start`, if it has one. Returns the number of steps they have done."""
    if start.checkpoint:
        updates = start.checkpoint.state.optimizer_updates
        cluster.learners.restore_checkpoint(start.checkpoint.path, updates, start.step)
    return start.step


def _restored_again(cluster: Cluster, start: Start) -> int:
    """As `_restore`, of learners that start afresh: one may be on a node that does not see the checkpoints."""
    try:
        return _restore(cluster, start)
    except (UserError, FileNotFoundError) as error:
        raise ClusterError(str(error)) from error


def _goes_on(config: Config) -> Start:
    """Where the run goes on, after a loss or inside another one."""
    start = find_start(config, resume=True)
    for note in start.notes:
        print(note, flush=True)
    return start
