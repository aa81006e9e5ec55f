"""The task of a run, for dry runs and plans. These do not download the Flower102 archive; a run does."""

import io
import math
from dataclasses import replace

from PIL import Image

from rft_cluster.config import Config, DataSection
from rft_cluster.data import FewShotDataset, load_dataset
from rft_cluster.data.archive import flower_classes
from rft_cluster.data.assemble import replace_keys
from rft_cluster.data.flower102 import takes_official
from rft_cluster.data.images import image_sha256
from rft_cluster.data.official import CACHE, is_cached, size_to_download
from rft_cluster.data.unseen import without_unseen
from rft_cluster.messages import Example, ImageRef
from rft_cluster.run.task import Task, family_of_model, prepare, prepare_also, question, task_of_also


def archive_is_missing(config: Config) -> bool:
    """Return True if a run would first download the official Flower102 archive."""
    sections = filter(None, [config.data, config.evaluation.also])
    return any(map(takes_official, sections)) and not is_cached()


def task_before_download(config: Config) -> Task:
    """The task with one grey picture in place of every image of the archive.

    The picture has as many image tokens as the model makes of any, so prompts' lengths, memory and seconds that follow
    from it are upper bounds. Numbers of images, classes, question and rewards are those of the run.

    Raises:
        UserError: the archive, or the data set on the hub that it belongs to, cannot be had; or as in `question`.
    """
    side, seed = family_of_model(config).side, config.run.seed
    grey = grey_picture(config.model.pixels(side)[1], side)
    data, also = config.data, config.evaluation.also
    if takes_official(data):
        dataset = _with_grey(data, seed, grey)
        task = Task(dataset, question(config, dataset))
    else:
        task = prepare(config)
    if also and takes_official(also):
        return replace(task, also=task_of_also(config, also, _with_grey(also, seed, grey)))
    return replace(task, also=prepare_also(config))


def _with_grey(data: DataSection, seed: int, grey: bytes) -> FewShotDataset:
    base, counts = _known(data, seed)
    train, validation, test = (
        [
            Example(ImageRef(f"{split}/{index}", image_sha256(grey)), base.classes[index % len(base.classes)])
            for index in range(counts[split])
        ]
        for split in ("train", "validation", "test")
    )
    remark = (
        f"the official Flower102 archive is not here yet: the run first downloads {size_to_download()} to "
        f"{CACHE} and checks the images. Until then each counts as large as the model looks at any"
    )
    whole = replace(
        base,
        train=[*base.train, *train],
        validation=validation,
        test=test,
        images={**base.images, image_sha256(grey): grey},
        remarks=[*base.remarks, remark],
    )
    return without_unseen(whole, data)


def _known(data: DataSection, seed: int) -> tuple[FewShotDataset, dict[str, int]]:
    """What is known of the data set without the archive, and how many of its images each split will get."""
    held_out = {"train": 0, "validation": data.validation, "test": data.test}
    if data.source != "flower102":
        return load_dataset(replace_keys(data, validation=0, test=0), seed), held_out
    classes = [name for name in data.classes or flower_classes() if data.only is None or name in data.only]
    return FewShotDataset.of(data.source, classes, [], [], [], []), held_out | {"train": data.shots * len(classes)}


def grey_picture(max_pixels: int, side: int) -> bytes:
    """A picture of the most image tokens that fit into `max_pixels`, as nearly square as that. PNG. `side`: pixels of a
    token's side."""
    tokens = max_pixels // side**2
    _, rows = max((tokens // rows * rows, rows) for rows in range(1, math.isqrt(tokens) + 1))
    file = io.BytesIO()
    Image.new("RGB", (tokens // rows * side, rows * side), "grey").save(file, "PNG")
    return file.getvalue()
