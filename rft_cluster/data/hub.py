"""Data sets of Hugging Face: from the hub by name, or from a folder of `save_to_disk` or of parquet files.

    image, label                  `label` with names (ClassLabel) or text; both columns can be called otherwise
    image, problem, solution      Visual-RFT's (arXiv 2503.01785): `<answer>label</answer>`, and the question to ask

Images must lie in the set itself, encoded: a path in a row is not followed. No code of a data set is run: `datasets`
has not been able to since version 4.

Where validation and test images come from:

    the set has a split `test`    from it
    data.held_out is given        from that Flower102 archive, without the pictures that are trained on
    otherwise                     from what the shots leave over
"""

import hashlib
import io
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from rft_cluster.config import DataSection
from rft_cluster.data.archive import open_archive
from rft_cluster.data.dataset import FewShotDataset, check_classes, few_shot_split, listing, read_examples
from rft_cluster.data.images import DECODE_ERRORS, FORMATS, open_image
from rft_cluster.errors import UserError
from rft_cluster.messages import Example
from rft_cluster.rewards.accuracy import extract_answer, normalise_label

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SIDE = 16  # of the small copies by which a picture is known again
# Root of the mean squared difference, in grey levels of 255, up to which two small copies are the same picture. On
# scikit-learn's two sample photographs encoding anew (JPEG of quality 40, PNG, WebP) and scaling to 224 pixels gave at
# most 2.0, cutting 1 % off one side 3.7 and more. A picture that is taken for another only leaves the test.
SAME_PICTURE = 3.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """One split. Its `examples` are without their images, which `read` gives."""

    images: "Dataset"
    column: str
    examples: list[Example]
    digests: list[str]
    """Equal for byte-equal images."""

    def read(self, example_id: str) -> bytes:
        image: bytes = self.images[int(example_id.rpartition("/")[2])][self.column]["bytes"]
        return image


def load_hub(config: DataSection, seed: int) -> FewShotDataset:
    """The few-shot splits of the set that `data.path` names. Example ids are `split/row`.

    Only the chosen images are decoded, and the pool holds the training images only. Classes stand in the order
    of ClassLabel, or else of the alphabet; names without a training image are left out.

    Raises:
        UserError: the set cannot be had, has other columns, labels or splits, or too few images, or a chosen
            image cannot be decoded.
    """
    name, splits = _open(config.path)
    source = _training_split(name, splits)
    labels, order = _labels(splits[source], config, f"{name}, split {source}")
    present = set(labels)
    classes = check_classes([label for label in order if label in present], config.classes)
    rows = _rows(splits[source], source, labels, config, name)
    own_test = source != "test" and "test" in splits
    if own_test and config.held_out is not None:
        raise UserError(f"data.held_out is set, but {name} has a test split of its own: set data.held_out=null")

    apart = own_test or config.held_out is not None
    if not apart:
        _check_left_over(name, len(labels), len(classes), config)
    own = config.model_copy(update={"validation": 0, "test": 0}) if apart else config
    chosen = few_shot_split(name, rows.examples, classes, own, seed, rows.digests)
    train, validation, test = (
        read_examples(split, rows.read, name) for split in (chosen.train, chosen.validation, chosen.test)
    )
    if own_test:
        validation, test = _from_test_split(name, splits["test"], set(rows.digests), classes, config, seed)
    elif config.held_out is not None and config.validation + config.test:
        validation, test = _from_archive(name, train, classes, config, seed)
    pool = [example.image for example in train]
    return FewShotDataset(name, classes, train, validation, test, pool, _problem(splits[source], name))


# --- reading


def _open(path: Path | None) -> tuple[str, "dict[str, Dataset]"]:
    """The name and splits of the set that `data.path` names."""
    if path is None:
        raise UserError(
            "data.path is missing: set it to a data set on the hub, e.g. laolao77/ViRFT_CLS_flower_4_shot, or to a "
            "folder of save_to_disk or of parquet files"
        )
    folder = path.expanduser()
    if not folder.exists() and not HUB_NAME.fullmatch(path.as_posix()):
        raise UserError(f"data.path: {path} is neither a folder nor a name on the hub of the form owner/name")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"data.path: {folder} is not a folder; it must be one of save_to_disk or of parquet files")

    import datasets  # takes seconds to import
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        if not folder.exists():
            found = datasets.load_dataset(path.as_posix())
        elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset("parquet", data_dir=str(folder))
    except DatasetNotFoundError as error:
        raise UserError(
            f"data.path: {path} is no folder here, and the hub has no such data set or does not show it to you "
            f"({error}). Check the name; for a private or gated one log in with: hf auth login"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"data.path: {path} is no folder here, and the hub cannot be reached ({error}). Where it can be, run:\n"
            f"  python -c \"import datasets; datasets.load_dataset('{path.as_posix()}').save_to_disk('saved')\"\n"
            f"Bring the folder saved/ here and set data.path to it"
        ) from error
    except (DatasetsError, OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise UserError(
            f"data.path: {path} cannot be read as a data set ({error}). It must be a folder of save_to_disk, a folder "
            f"of parquet files, or a name on the hub"
        ) from error
    splits = found if isinstance(found, dict) else {"train": found}
    return path.name, {str(split): rows for split, rows in splits.items()}


def _training_split(name: str, splits: "dict[str, Dataset]") -> str:
    if "train" in splits:
        return "train"
    others = [split for split in splits if split != "test"] or list(splits)
    if len(others) != 1:
        raise UserError(f"data.path: {name} has no split train to learn from, but {', '.join(splits) or 'none'}")
    return others[0]


def _labels(rows: "Dataset", config: DataSection, where: str) -> tuple[list[str], list[str]]:
    """Each row's label, and all labels in the order of the classes."""
    import datasets

    if "solution" in rows.column_names:
        answers = [extract_answer(text) if isinstance(text, str) else None for text in rows["solution"]]
        return _complete(answers, "solution without one <answer>label</answer>", where)
    column = config.label_column
    feature = _feature(rows, column, "data.label_column", where)
    if isinstance(feature, datasets.ClassLabel):
        names: list[str] = feature.names
        numbers = list(rows[column])
        return _complete([None if n is None or n < 0 else names[n] for n in numbers], "no label", where)[0], names
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return _complete(list(rows[column]), "no label", where)
    raise UserError(
        f"data.label_column: column {column!r} of {where} must hold names (ClassLabel or text), not {feature}. "
        f"Cast it, or take another column of {', '.join(rows.column_names)}"
    )


def _complete(labels: list[str | None], problem: str, where: str) -> tuple[list[str], list[str]]:
    """The labels without white space around them, if there are no empty ones; and the different ones, sorted."""
    stripped = [(label or "").strip() for label in labels]
    lines = [f"row {index}: {problem}" for index, label in enumerate(stripped) if not label]
    if lines:
        raise UserError(
            f"data.path: {len(lines)} of the {len(labels)} rows of {where} have no label:\n{listing(lines)}"
        )
    return stripped, sorted(set(stripped))


def _feature(rows: "Dataset", column: str, key: str, where: str) -> Any:
    if column not in rows.column_names:
        raise UserError(f"{key}: {where} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return rows.features[column]


def _rows(rows: "Dataset", split: str, labels: list[str], config: DataSection, name: str) -> Rows:
    import datasets

    column, where = config.image_column, f"{name}, split {split}"
    feature = _feature(rows, column, "data.image_column", where)
    encoded = isinstance(feature, dict) and "bytes" in feature  # parquet files that others than `datasets` wrote
    if not encoded and not isinstance(feature, datasets.Image):
        raise UserError(f"data.image_column: column {column!r} of {where} must hold images, not {feature}")
    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    examples, digests, problems = [], [], []
    for index, (row, label) in enumerate(zip(images, labels, strict=True)):
        data = row[column] and row[column]["bytes"]
        if not data:
            problems.append(f"row {index}")
            continue
        examples.append(Example(f"{split}/{index:06d}", b"", label))
        digests.append(hashlib.sha256(data).hexdigest())
    if problems:
        raise UserError(
            f"data.path: {len(problems)} of the {len(labels)} rows of {where} hold no image, at most a path, which is "
            f"not followed. Save the set with the images in it:\n{listing(problems)}"
        )
    return Rows(images, column, examples, digests)


def _problem(rows: "Dataset", name: str) -> str | None:
    """The question in column `problem` of a set that has `solution` as well."""
    if not {"problem", "solution"} <= set(rows.column_names):
        return None
    texts = sorted({str(text) for text in rows["problem"]})
    if len(texts) > 1:
        shown = listing([repr(text) for text in texts])
        raise UserError(
            f"data.path: column problem of {name} must ask the same of every image, but holds {len(texts)} different "
            f"texts; remove the column or make them one:\n{shown}"
        )
    return texts[0]


# --- held-out images


def _check_left_over(name: str, images: int, classes: int, config: DataSection) -> None:
    left, wanted = images - config.shots * classes, config.validation + config.test
    if left < wanted and left <= 0:
        raise UserError(
            f"{name} has only its {images} training images and no test split, but data.validation is "
            f"{config.validation} and data.test {config.test}. Set both to 0, or data.held_out to a Flower102 archive "
            f"to draw them from"
        )


def _from_test_split(
    name: str, rows: "Dataset", trained: set[str], classes: list[str], config: DataSection, seed: int
) -> tuple[list[Example], list[Example]]:
    labels, _ = _labels(rows, config, f"{name}, split test")
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise UserError(
            f"data.path: split test of {name} has labels without a training image:\n{listing(list(map(repr, unknown)))}"
        )
    test = _rows(rows, "test", labels, config, name)
    kept = [i for i, digest in enumerate(test.digests) if digest not in trained]
    _warn_of_copies(len(labels) - len(kept), f"split test of {name}")
    chosen = _choose(name, [test.examples[i] for i in kept], [test.digests[i] for i in kept], classes, config, seed)
    return read_examples(chosen.validation, test.read, name), read_examples(chosen.test, test.read, name)


def _from_archive(
    name: str, train: list[Example], classes: list[str], config: DataSection, seed: int
) -> tuple[list[Example], list[Example]]:
    archive = open_archive(config.held_out, "data.held_out")
    own_label = {normalise_label(label): label for label in classes}
    theirs = {normalise_label(example.label): example.label for example in archive.examples}
    lines = [f"{own_label[key]!r} is in {name} only" for key in sorted(own_label.keys() - theirs.keys())]
    lines += [f"{theirs[key]!r} is in the archive only" for key in sorted(theirs.keys() - own_label.keys())]
    if lines:
        raise UserError(f"data.held_out: its classes and those of {name} differ:\n{listing(lines)}")

    where = f"data.held_out ({archive.root})"
    known = _known_pictures([e.image for e in train], [e.example_id for e in archive.examples], archive.read, where)
    kept = [i for i, copy in enumerate(known) if not copy]
    _warn_of_copies(len(known) - len(kept), where)
    examples = [replace(e, label=own_label[normalise_label(e.label)]) for e in (archive.examples[i] for i in kept)]
    chosen = _choose(name, examples, [archive.digests[i] for i in kept], classes, config, seed)
    return read_examples(chosen.validation, archive.read, where), read_examples(chosen.test, archive.read, where)


def _choose(
    name: str, examples: list[Example], digests: list[str], classes: list[str], config: DataSection, seed: int
) -> FewShotDataset:
    """Validation and test alone: no shots are set aside."""
    return few_shot_split(name, examples, classes, config.model_copy(update={"shots": 0}), seed, digests)


def _warn_of_copies(count: int, where: str) -> None:
    if count:
        logger.warning("left out %d images of %s: copies of training images", count, where)


def _known_pictures(train: list[bytes], candidates: list[str], read: Callable[[str], bytes], where: str) -> list[bool]:
    """Which candidates show a picture of `train`, perhaps encoded or scaled otherwise, so that no digest tells.

    All are held against all by small copies, whose distance changes little by encoding and scaling.
    """
    small = np.stack([_small_copy(image) for image in train])  # [train, SIDE * SIDE * 3]
    known, problems = [], []
    for example_id in candidates:
        try:
            differences = small - _small_copy(read(example_id))
        except DECODE_ERRORS as error:
            problems.append(f"{example_id}: {error}")
        else:
            known.append(bool((np.square(differences).mean(axis=1) <= SAME_PICTURE**2).any()))
    if problems:
        raise UserError(
            f"{len(problems)} of the {len(candidates)} images in {where} cannot be read; mend or replace them:\n"
            f"{listing(problems)}"
        )
    return known


def _small_copy(data: bytes) -> np.ndarray:
    """The picture as SIDE x SIDE x 3 grey levels; JPEG is decoded at an eighth of its size, many times faster."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format == "JPEG":
        image.draft("RGB", (4 * SIDE, 4 * SIDE))
        picture = ImageOps.exif_transpose(image).convert("RGB")
    else:
        picture = open_image(data)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()
