"""Data sets: plain functions `(DataSection, seed) -> FewShotDataset`.

    data:
      source: folder          # a name in SOURCES, or a function of your own: my_package.my_module:my_dataset
      path: photos
      shots: 4

To add a built-in one: write the function in a file of this folder and name it in `SOURCES`. It describes the labelled
images (one `reading.Unread` each for train, validation and test) and passes them to `assemble.assemble`.
"""

import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import find_function, slip
from rft_cluster.common.progress import with_progress
from rft_cluster.config import DataSection
from rft_cluster.data.conflicts import near_copies_note
from rft_cluster.data.dataset import (
    FewShotDataset,
    LabelledImage,
    check_aliases,
    check_labels,
    check_names,
    composed,
    listing,
)
from rft_cluster.data.digits import load_digits
from rft_cluster.data.flower102 import load_flower102
from rft_cluster.data.folder import load_folder
from rft_cluster.data.hub import load_hub
from rft_cluster.data.images import Limits, check_image
from rft_cluster.data.lazy import Pool
from rft_cluster.data.manifest import check_manifest, manifest, read_manifest
from rft_cluster.data.names import stripped_names
from rft_cluster.data.shown import WHOLE, View, as_shown
from rft_cluster.data.split import few_shot_split
from rft_cluster.data.table import load_table
from rft_cluster.data.unseen import without_unseen
from rft_cluster.messages import Example

__all__ = ["SOURCES", "DataSection", "FewShotDataset", "LabelledImage", "few_shot_split", "load_dataset", "manifest"]

SOURCES: dict[str, Callable[[DataSection, int], FewShotDataset]] = {
    "digits": load_digits,
    "folder": load_folder,
    "csv": load_table,
    "flower102": load_flower102,
    "huggingface": load_hub,
}


def load_dataset(config: DataSection, seed: int, view: View = WHOLE) -> FewShotDataset:
    """Read the configured data set and choose its few-shot splits; the same for the same config and seed.

    No image is kept larger than the model looks at it, as `view` says.

    With `data.manifest` the splits are those of the manifest: its seed and its numbers of images replace `seed`,
    `data.shots`, `data.validation` and `data.test`. Each example gets its class's `data.aliases`. Training and
    validation images of `data.unseen_classes` are left out.

    Raises:
        UserError: the source is unknown, its data are unusable or differ from the manifest, or the user's own function
            returned a data set that cannot be trained and tested on.
    """
    earlier = read_manifest(config.manifest) if config.manifest else None
    if earlier:
        splits, seed = earlier["splits"], earlier["seed"]
        shots = min(Counter(entry["label"] for entry in splits["train"]).values())
        sizes = {"shots": shots, "validation": len(splits["validation"]), "test": len(splits["test"])}
        levels = {"sixteen_bit": earlier["levels"]} if earlier["levels"] else {}
        config = config.model_copy(update=sizes | levels)
    dataset = _call(config, seed)
    if not isinstance(dataset, FewShotDataset):
        raise UserError(f"data.source: {config.source} must return a FewShotDataset, not {type(dataset).__name__}")
    if config.source not in SOURCES:
        _check_types(dataset, config.source)
    check_labels(dataset.classes)
    if earlier:
        check_manifest(dataset, earlier)
        dataset = replace(dataset, left_out=tuple(earlier["left_out"]))
    else:  # a run of an earlier version goes on with its names
        check_names(dataset.classes)
    _check_splits(dataset, config)
    if config.source not in SOURCES:
        _check_images(dataset, config)
        _check_choices(dataset, config)
    dataset = as_shown(replace(without_unseen(dataset, config), augment=config.augment), config, view)
    dataset = replace(dataset, remarks=dataset.remarks + near_copies_note(dataset))
    return _with_aliases(dataset, config)


def _call(config: DataSection, seed: int) -> FewShotDataset:
    function = find_function(config.source, SOURCES, "data.source")
    if config.source in SOURCES:
        return function(config, seed)
    try:
        return function(config, seed)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise slip(f"data.source: {config.source!r}", error) from error


def _check_types(dataset: FewShotDataset, source: str) -> None:
    """Check the types of a data set that the user's own function returned."""
    wanted = {"name": str, "classes": str, "pool": bytes, **dict.fromkeys(dataset.splits, Example)}
    for name, kind in wanted.items():
        values = [dataset.name] if name == "name" else getattr(dataset, name)
        if not isinstance(values, list | Pool):
            raise UserError(f"data.source: {source} returned a {type(values).__name__} as {name}, not a list")
        for value in values:
            if not isinstance(value, kind):
                cure = ": make the data set with few_shot_split or FewShotDataset.of" if kind is Example else ""
                raise UserError(
                    f"data.source: {source} returned {reprlib.repr(value)} in {name}, where {kind.__name__} belongs"
                    f"{cure}"
                )


def _check_splits(dataset: FewShotDataset, config: DataSection) -> None:
    for split, examples, wanted in (("train", dataset.train, config.shots), ("test", dataset.test, config.test)):
        if wanted and not examples:
            raise UserError(f"data.source: {config.source} returned no {split} images")
    ids = set()
    for example in (e for split in dataset.splits.values() for e in split):
        if example.label not in dataset.classes:
            raise UserError(
                f"data.source: {example.example_id} of {config.source} has label {example.label!r}, which is "
                f"not one of its classes"
            )
        if example.example_id in ids:
            raise UserError(f"data.source: {config.source} has {example.example_id} twice, or in two splits")
        ids.add(example.example_id)


def _check_choices(dataset: FewShotDataset, config: DataSection) -> None:
    """Check that the user's own function applied `data.only` and `data.strip_prefix`, as `few_shot_split` does."""
    if config.only is not None and not set(dataset.classes) <= set(config.only):
        raise UserError(f"data.only: {config.source} returned other classes: {', '.join(dataset.classes)}")
    if config.strip_prefix and stripped_names(dataset.classes):
        raise UserError(f"data.strip_prefix: {config.source} returned the names with their prefix")


def _check_images(dataset: FewShotDataset, config: DataSection) -> None:
    """Decode every image that the user's own function returned. The built-in sources have done so already."""
    read: dict[str, Callable[[], bytes]]
    read = {e.example_id: partial(dataset.image, e) for split in dataset.splits.values() for e in split}
    read |= {f"pool[{index}]": partial(dataset.pool.__getitem__, index) for index in range(len(dataset.pool))}
    problems = []
    for where in with_progress(list(read), "reading images"):
        try:
            check_image(read[where](), where, Limits(config.max_pixels, config.max_bytes))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"data.source: {len(problems)} of the {len(read)} images of {config.source} cannot be used; fix or "
            f"leave them out:\n{listing(problems)}"
        )


def _with_aliases(dataset: FewShotDataset, config: DataSection) -> FewShotDataset:
    wanted = config.aliases
    if config.only is not None:  # aliases of excluded classes are allowed
        wanted = {label: names for label, names in wanted.items() if composed(label) in dataset.classes}
    aliases = check_aliases(dataset.classes, wanted)
    if not aliases:
        return dataset
    train, validation, test = (
        [replace(e, aliases=aliases.get(e.label, e.aliases)) for e in split] for split in dataset.splits.values()
    )
    return replace(dataset, train=train, validation=validation, test=test)
