"""Find the label and image columns of a Hugging Face data set, and read labels and images from them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from rft_cluster.common.errors import UserError
from rft_cluster.common.labels import extract_answer
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import composed, listing
from rft_cluster.data.images import image_sha256
from rft_cluster.data.names import given, named_numbers
from rft_cluster.data.reading import Labelled, Unread, skip_or_refuse

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_WORDS = ("image", "images", "img", "picture", "photo", "jpg", "png")
LABEL_WORDS = ("label", "labels", "class", "category", "target", "answer", "species", "breed")
SOLUTION = "solution"  # Visual-RFT's column of answers in tags
TEXT = ("string", "large_string", "string_view")
BINARY = ("binary", "large_binary", "binary_view")


class Columns(NamedTuple):
    """`answers`: the labels stand in answer tags."""

    image: str
    label: str
    answers: bool


def find_columns(rows: "Dataset", config: DataSection, where: str) -> Columns:
    """The configured columns, or the only ones that fit.

    Raises:
        UserError: there is no such column, or more than one.
    """
    names = rows.column_names
    images = [name for name in names if _is_image(rows.features[name])]
    image = _column(config.image_column, "image", IMAGE_WORDS, images, names, where)
    if not _is_image(rows.features[image]):
        hint = (
            ". A path is not followed: for a table of paths and labels set data.source=csv"
            if _is_text(rows, image)
            else ""
        )
        raise UserError(
            f"data.image_column: column {image!r} of {where} must hold images, not {rows.features[image]}{hint}"
        )
    # Earlier versions recorded `label_column: label` for every run, whether the user had set it or not.
    unset = config.label_column is None or (config.label_column == "label" and "label" not in names)
    if unset and SOLUTION in names:
        return Columns(image, SOLUTION, True)
    label = _column(config.label_column, "label", LABEL_WORDS, [], [n for n in names if n != image], where)
    return Columns(image, label, config.label_column is not None and _in_tags(rows, label))


def _column(
    wanted: str | None, kind: str, words: tuple[str, ...], fitting: list[str], names: list[str], where: str
) -> str:
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"data.{kind}_column: {where} has no column {wanted!r}; it has {', '.join(names)}")
        return wanted
    if words[0] in names:
        return words[0]
    found = fitting if len(fitting) == 1 else [name for name in names if name.casefold() in words]
    if len(found) != 1:
        raise UserError(
            f"data.{kind}_column: {where} has no column {words[0]!r}; it has {', '.join(names)}: set "
            f"data.{kind}_column to the one of {kind}s"
        )
    return found[0]


# --- labels


def labels_of(
    rows: "Dataset", columns: Columns, config: DataSection, where: str, may_lack_all: bool = False
) -> tuple[list[str], list[str]]:
    """Each row's label, and the classes in order. With `may_lack_all`, a split without any label gets empty labels.

    Raises:
        UserError: the column is missing, of another type, or rows have no label.
    """
    import datasets

    if columns.label not in rows.column_names:
        if may_lack_all:
            return [""] * len(rows), []
        raise UserError(f"data.label_column: {where} has no column {columns.label!r}")
    feature, values = rows.features[columns.label], list(rows[columns.label])
    order: list[str] | None = None
    if columns.answers:
        found = [extract_answer(text) if isinstance(text, str) else None for text in values]
        if not any(found) and not may_lack_all:
            others = ", ".join(name for name in rows.column_names if name not in (columns.image, columns.label))
            raise UserError(
                f"data.path: column {columns.label} of {where} holds no <answer>label</answer>. Name the column of "
                f"labels: data.label_column= one of {others or columns.label}"
            )
        problem = "solution without one <answer>label</answer>"
    elif isinstance(feature, datasets.ClassLabel):
        order = [composed(name).strip() for name in feature.names]
        found = [order[n] if n is not None and 0 <= n < len(order) else None for n in values]
        problem = "no label"
    elif isinstance(feature, datasets.Value) and feature.dtype in TEXT:
        found, problem = [given((text or "").strip(), config.classes) for text in values], "no label"
    elif isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float")):
        found, problem = (
            named_numbers([_whole(value) for value in values], config.classes),
            "no label, or no whole number",
        )
    elif isinstance(feature, datasets.Value) and feature.dtype == "bool":
        found, problem = [None if value is None else str(value).lower() for value in values], "no label"
    else:
        raise UserError(
            f"data.label_column: column {columns.label!r} of {where} must hold one name or number an image, not "
            f"{feature}. Take another column of {', '.join(rows.column_names)}"
        )
    labels = _complete(found, problem, where, may_lack_all)
    return labels, order or _sorted(set(labels))


def _whole(value: float | None) -> str | None:
    """The text of an integer >= 0, else None. Data sets write -1 for a missing label."""
    if value is None or value != value or value < 0 or value % 1:  # NaN != NaN
        return None
    return str(int(value))


def _sorted(labels: Iterable[str]) -> list[str]:
    """Labels in alphabetical order, or in numerical order if all are numbers."""
    return sorted(labels, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))


def _complete(labels: list[str | None], problem: str, where: str, may_lack_all: bool) -> list[str]:
    """The labels in NFC, stripped of white space. Refuse empty ones, unless `may_lack_all` and all are empty."""
    stripped = [composed(label or "").strip() for label in labels]
    lines = [f"row {index}: {problem}" for index, label in enumerate(stripped) if not label]
    if lines and not (may_lack_all and len(lines) == len(labels)):
        raise UserError(
            f"data.path: {len(lines)} of the {len(labels)} rows of {where} have no label; give them one or "
            f"remove them, or name the splits to use with data.splits:\n{listing(lines)}"
        )
    return stripped


def _in_tags(rows: "Dataset", label: str) -> bool:
    """Return True if every row has its label in answer tags, as in column `solution`."""
    values = rows[label] if _is_text(rows, label) else []
    return len(values) > 0 and all(isinstance(text, str) and extract_answer(text) is not None for text in values)


def problems_of(rows: "Dataset") -> tuple[str, ...]:
    """The distinct questions in column `problem`, if the set also has a column `solution`."""
    if not {"problem", SOLUTION} <= set(rows.column_names):
        return ()
    return tuple(sorted({str(text) for text in rows["problem"]}))


# --- images


def _is_text(rows: "Dataset", column: str) -> bool:
    import datasets

    feature = rows.features[column]
    return isinstance(feature, datasets.Value) and feature.dtype in TEXT


def _is_image(feature: Any) -> bool:
    """Return True for a column of encoded images: `datasets.Image`, a struct with bytes, plain bytes, or a list of
    these."""
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return "bytes" in feature
    if isinstance(feature, datasets.Value):
        return feature.dtype in BINARY
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _is_image(feature.feature)
    return isinstance(feature, list) and len(feature) == 1 and _is_image(feature[0])


def _undecoded(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    return feature


def unread_rows(
    rows: "Dataset", split: str, labels: list[str], columns: Columns, config: DataSection, name: str
) -> Unread:
    """The labelled images of a split, not decoded yet. Ids are `split/row`."""
    where = f"{name}, split {split}"
    if columns.image not in rows.column_names or not _is_image(rows.features[columns.image]):
        raise UserError(f"data.image_column: {where} has no column {columns.image!r} of images")
    feature = rows.features[columns.image]
    images = rows.select_columns([columns.image])
    if _undecoded(feature) != feature:
        images = images.cast_column(columns.image, _undecoded(feature))
    examples, digests, skipped = [], [], {}
    for index, (row, label) in enumerate(zip(images, labels, strict=True)):
        data, problem = _bytes(row[columns.image])
        examples.append(Labelled(f"{split}/{index:06d}", label))
        digests.append(image_sha256(data) if data else "")
        if not data:
            skipped[examples[-1].example_id] = problem
    skip_or_refuse(skipped, f"{len(labels)} rows of {where}", config)

    def read(example_id: str) -> bytes:
        return _bytes(images[int(example_id.rpartition("/")[2])][columns.image])[0]

    return Unread(examples, digests, read, where, skipped)


def _bytes(value: Any) -> tuple[bytes, str]:
    """The encoded image in a cell and ""; or b"" and the reason why there is none."""
    if isinstance(value, list):
        if len(value) != 1:
            return b"", f"{len(value)} images in the row, one is needed"
        value = value[0]
    data = value.get("bytes") if isinstance(value, dict) else value
    return (data or b""), "no image in the row, at most a path, which is not followed"
