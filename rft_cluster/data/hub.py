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
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data.archive import open_archive
from rft_cluster.data.dataset import FewShotDataset, check_classes, composed, listing
from rft_cluster.data.images import DECODE_ERRORS, FORMATS, open_image, upright
from rft_cluster.data.labels import extract_answer, normalise_label
from rft_cluster.data.split import Unread, copies_of, held_out_only, skip_or_refuse, split_and_read, training_only
from rft_cluster.messages import Example

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PLAIN_NAME = re.compile(r"\w[\w.-]*")
SIDE = 16  # of the small copies by which a picture is known again
# Root of the mean squared difference, in grey levels of 255, up to which two small copies are the same picture. On
# scikit-learn's two sample photographs encoding anew (JPEG of quality 40, PNG, WebP) and scaling to 224 pixels gave at
# most 2.0, cutting 1 % off one side 3.7 and more. A picture that is taken for another only leaves the test.
SAME_PICTURE = 3.0


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
    dataset = split_and_read(name, rows, classes, training_only(config) if apart else config, seed)
    if own_test:
        dataset = _with_test_split(dataset, rows, splits["test"], config, seed)
    elif config.held_out is not None and dataset.train and config.validation + config.test:
        dataset = _with_archive(dataset, config, seed)
    return replace(dataset, problem=_problem(splits[source], name))


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
            _check_saved(folder)
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
    return path.name, {str(split): rows.with_format(None) for split, rows in splits.items()}


def _check_saved(folder: Path) -> None:
    """Refuse a folder of `save_to_disk` whose JSON files lead out of it: `datasets` opens what they name."""
    whole = folder / "dataset_dict.json"
    splits = json.loads(whole.read_text(encoding="utf-8"))["splits"] if whole.is_file() else []
    named = [(folder, split) for split in splits]
    for part in [folder / split for split in splits] or [folder]:
        state = json.loads((part / "state.json").read_text(encoding="utf-8"))
        named += [(part, file["filename"]) for file in state["_data_files"]]
    root = folder.resolve()
    wrong = [
        repr(name)
        for part, name in named
        if not (PLAIN_NAME.fullmatch(name) and (part / name).resolve().is_relative_to(root))
    ]
    if wrong:
        raise UserError(
            f"data.path: {folder} names files or folders that do not lie in it; save the set anew with save_to_disk:\n"
            f"{listing(wrong)}"
        )


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
        names = [composed(name).strip() for name in feature.names]
        numbers = [-1 if number is None else number for number in rows[column]]
        return _complete([names[n] if 0 <= n < len(names) else None for n in numbers], "no label", where)[0], names
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return _complete(list(rows[column]), "no label", where)
    raise UserError(
        f"data.label_column: column {column!r} of {where} must hold names (ClassLabel or text), not {feature}. "
        f"Cast it, or take another column of {', '.join(rows.column_names)}"
    )


def _complete(labels: list[str | None], problem: str, where: str) -> tuple[list[str], list[str]]:
    """The labels, composed (NFC) and without white space around them, if none is empty; and each once, sorted."""
    stripped = [composed(label or "").strip() for label in labels]
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


def _rows(rows: "Dataset", split: str, labels: list[str], config: DataSection, name: str) -> Unread:
    import datasets

    column, where = config.image_column, f"{name}, split {split}"
    feature = _feature(rows, column, "data.image_column", where)
    encoded = isinstance(feature, dict) and "bytes" in feature  # parquet files that others than `datasets` wrote
    if not encoded and not isinstance(feature, datasets.Image):
        raise UserError(f"data.image_column: column {column!r} of {where} must hold images, not {feature}")
    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    examples, digests, skipped = [], [], {}
    for index, (row, label) in enumerate(zip(images, labels, strict=True)):
        data = row[column] and row[column]["bytes"]
        examples.append(Example(f"{split}/{index:06d}", b"", label))
        digests.append(hashlib.sha256(data).hexdigest() if data else "")
        if not data:
            skipped[examples[-1].example_id] = "no image in the row, at most a path, which is not followed"
    skip_or_refuse(skipped, f"{len(labels)} rows of {where}", config)

    def read(example_id: str) -> bytes:
        image: bytes = images[int(example_id.rpartition("/")[2])][column]["bytes"]
        return image

    return Unread(examples, digests, read, name, skipped)


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


def _with_test_split(
    dataset: FewShotDataset, trained: Unread, rows: "Dataset", config: DataSection, seed: int
) -> FewShotDataset:
    name = dataset.name
    labels, _ = _labels(rows, config, f"{name}, split test")
    unknown = sorted(set(labels) - set(dataset.classes))
    if unknown:
        raise UserError(
            f"data.path: split test of {name} has labels without a training image:\n{listing(list(map(repr, unknown)))}"
        )
    test = _rows(rows, "test", labels, config, name)
    known = copies_of(trained.examples, trained.digests, test.examples, test.digests)
    held_out = split_and_read(name, test.without(known), dataset.classes, held_out_only(config), seed)
    return dataset.with_held_out(held_out, known)


def _with_archive(dataset: FewShotDataset, config: DataSection, seed: int) -> FewShotDataset:
    name = dataset.name
    archive = open_archive(config.held_out, "data.held_out")
    own_label = {normalise_label(label): label for label in dataset.classes}
    theirs = {normalise_label(example.label): example.label for example in archive.examples}
    lines = [f"{own_label[key]!r} is in {name} only" for key in sorted(own_label.keys() - theirs.keys())]
    lines += [f"{theirs[key]!r} is in the archive only" for key in sorted(theirs.keys() - own_label.keys())]
    if lines:
        raise UserError(f"data.held_out: its classes and those of {name} differ:\n{listing(lines)}")

    known, bad = _known_pictures(dataset.train, archive)
    skip_or_refuse(bad, f"{len(archive.examples)} images in {archive.where}", config)
    labelled = [replace(e, label=own_label[normalise_label(e.label)]) for e in archive.examples]
    left = replace(archive, examples=labelled, skipped=bad).without(known)
    held_out = split_and_read(name, left, dataset.classes, held_out_only(config), seed)
    return dataset.with_held_out(held_out, known)


def _known_pictures(train: list[Example], candidates: Unread) -> tuple[dict[str, str], dict[str, str]]:
    """Which candidates show a picture of `train`, perhaps encoded or scaled otherwise, so that no digest tells.

    All are held against all by small copies, whose distance changes little by encoding and scaling. Returns the ids
    of such candidates with that of the picture they show, and the ids of those that cannot be read with the reason.
    """
    small = np.stack([_small_copy(example.image) for example in train])  # [train, SIDE * SIDE * 3]
    known, bad = {}, {}
    for candidate in candidates.examples:
        try:
            differences = small - _small_copy(candidates.read(candidate.example_id))
        except DECODE_ERRORS as error:
            bad[candidate.example_id] = f"damaged or unsupported ({error})"
            continue
        distances = np.square(differences).mean(axis=1)
        nearest = int(distances.argmin())
        if distances[nearest] <= SAME_PICTURE**2:
            known[candidate.example_id] = train[nearest].example_id
    return known, bad


def _small_copy(data: bytes) -> np.ndarray:
    """The picture as SIDE x SIDE x 3 grey levels; JPEG is decoded at an eighth of its size, many times faster."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format == "JPEG":
        image.draft("RGB", (4 * SIDE, 4 * SIDE))
        picture = upright(image).convert("RGB")
    else:
        picture = open_image(data)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()
