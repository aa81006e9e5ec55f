"""Data sets: plain functions `(DataSection, seed) -> FewShotDataset`.

    data:
      source: folder          # a name in SOURCES, or a function of your own: my_package.my_module:my_dataset
      path: photos
      shots: 4

To add a built-in one: write the function in a file of this folder and name it in `SOURCES`.
"""

from collections.abc import Callable

from rft_cluster.config import DataSection
from rft_cluster.data.archive import load_flower102
from rft_cluster.data.dataset import FewShotDataset, check_labels
from rft_cluster.data.digits import load_digits
from rft_cluster.data.folder import load_folder
from rft_cluster.data.hub import load_hub
from rft_cluster.errors import UserError
from rft_cluster.rewards import find_function

SOURCES: dict[str, Callable[[DataSection, int], FewShotDataset]] = {
    "digits": load_digits,
    "folder": load_folder,
    "flower102": load_flower102,
    "huggingface": load_hub,
}


def load_dataset(config: DataSection, seed: int) -> FewShotDataset:
    """Read the configured data set and choose its few-shot splits; the same for the same config and seed.

    Raises:
        UserError: the source is unknown, its data will not do, or a function of the user's own returned a
            data set that cannot be trained and tested on.
    """
    dataset = find_function(config.source, SOURCES, "data.source")(config, seed)
    if not isinstance(dataset, FewShotDataset):
        raise UserError(f"data.source: {config.source} must return a FewShotDataset, not {type(dataset).__name__}")
    check_labels(dataset.classes)
    for split, examples, wanted in (("train", dataset.train, config.shots), ("test", dataset.test, config.test)):
        if wanted and not examples:
            raise UserError(f"data.source: {config.source} returned no {split} images")
    ids = set()
    for example in [*dataset.train, *dataset.validation, *dataset.test]:
        if example.label not in dataset.classes:
            raise UserError(
                f"data.source: {example.example_id} of {config.source} has label {example.label!r}, which is "
                f"not one of its classes"
            )
        if example.example_id in ids:
            raise UserError(f"data.source: {config.source} has {example.example_id} twice, or in two splits")
        ids.add(example.example_id)
    return dataset
