"""Check and start the trackers that a configuration asks for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config
from rft_cluster.data import FewShotDataset
from rft_cluster.run.tracker import Tracker
from rft_cluster.tracking.background import Background
from rft_cluster.tracking.figures import Shown
from rft_cluster.tracking.tensorboard import TensorBoard
from rft_cluster.tracking.wandb import WandB, check_login


def check_tracking(config: Config) -> None:
    """Check that the trackers can start, without importing them.

    Raises:
        UserError: a package is missing, or W&B has no key.
    """
    for name in config.tracking:
        found = find_spec(name)
        if found is None or found.loader is None:  # without a loader: a folder of that name here, which W&B makes
            others = ", ".join(other for other in config.tracking if other != name)
            raise UserError(
                f"tracking: the package {name} is not installed: `pip install {name}`, or leave it out: "
                f"tracking=[{others}]"
            )
    if "wandb" in config.tracking:
        check_login()


@contextmanager
def tracked(config: Config, dataset: FewShotDataset) -> Iterator[Sequence[Tracker]]:
    """Within this context the run's trackers take records, each in a thread of its own."""
    shown = Shown(dataset, config.schedule.steps)
    made: dict[str, Tracker] = {"tensorboard": TensorBoard(config.run_folder, shown), "wandb": WandB(config, shown)}
    trackers = [Background(name, made[name]) for name in dict.fromkeys(config.tracking)]
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()
