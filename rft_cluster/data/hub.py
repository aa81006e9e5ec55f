"""Load Hugging Face data sets: from the hub by name, from a folder of `save_to_disk`, or from parquet files.

    image, label                  `label` with names (ClassLabel), text or numbers; both columns may have other names
    image, problem, solution      Visual-RFT's (arXiv 2503.01785): `<answer>label</answer>`, and the question to ask

Rows must contain the encoded images; a path in a row is not followed. A data set's own code is never run: `datasets`
dropped that in version 4. `columns.py` decides what each column means.

Validation and test images come from the set's own splits (see `assemble.py`), or, with `data.held_out` or
`data.download`, from that Flower102 archive, without the training pictures.
"""

import glob
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rft_cluster.common.errors import Unavailable, UserError
from rft_cluster.common.files import walk
from rft_cluster.common.labels import normalise_label
from rft_cluster.common.lookup import near_path
from rft_cluster.config import DataSection
from rft_cluster.data.archive import open_archive
from rft_cluster.data.assemble import assemble, replace_keys, split_and_read
from rft_cluster.data.columns import find_columns, labels_of, problems_of, unread_rows
from rft_cluster.data.conflicts import SAME_PICTURE, small_copy
from rft_cluster.data.dataset import FewShotDataset, listing
from rft_cluster.data.files import TABLE_SUFFIXES, is_picture, is_system, some
from rft_cluster.data.flower102 import takes_official
from rft_cluster.data.images import DECODE_ERRORS
from rft_cluster.data.names import ROLES, find_splits, split_role
from rft_cluster.data.official import official_archive
from rft_cluster.data.reading import Unread, skip_or_refuse

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PLAIN_NAME = re.compile(r"\w[\w.-]*")


def load_hub(config: DataSection, seed: int) -> FewShotDataset:
    """The few-shot splits of the set that `data.path` names. Example ids are `split/row`.

    Only the chosen images are decoded. Classes have the order of ClassLabel, or else of the alphabet. Classes without
    a training image are left out, except those of `data.unseen_classes`.

    Raises:
        Unavailable: the hub cannot be reached.
        UserError: the set cannot be loaded, has unsuitable columns, labels or splits, or too few images, or a chosen
            image cannot be decoded.
    """
    name, sets = _open(config.path)
    roles = _roles(name, sets, config)
    train = sets[roles["train"]]
    columns = find_columns(train, config, f"{name}, split {roles['train']}")
    labels, order = labels_of(train, columns, config, f"{name}, split {roles['train']}")
    parts = {"train": unread_rows(train, roles["train"], labels, columns, config, name)}
    remarks = []
    for role in ("validation", "test"):
        split = roles.get(role)
        if split is None:
            continue
        where = f"{name}, split {split}"
        theirs, _ = labels_of(sets[split], columns, config, where, may_lack_all=True)
        if not any(theirs):
            remarks.append(f"split {split} has no labels: it is left out")
        else:
            parts[role] = unread_rows(sets[split], split, theirs, columns, config, name)
    unused = [split for split in sets if split not in roles.values()]
    remarks += [f"splits that are not used: {some(unused)} (data.splits names those to use)"] if unused else []
    if len(parts) > 1 and config.held_out is not None:
        own = "test" if "test" in parts else "validation"
        raise UserError(f"data.held_out is set, but {name} has a {own} split of its own: set data.held_out=null")
    apart = config.held_out is not None or (len(parts) == 1 and takes_official(config))
    if len(parts) == 1 and not apart and not config.folds:
        _check_left_over(name, labels, config)
    found = [label for label in order if label in set(labels)]
    training = replace_keys(config, validation=0, test=0) if apart else config
    dataset = assemble(name, parts, found, training, seed)
    if apart and dataset.train and config.validation + config.test:
        dataset = _with_archive(dataset, config, seed)
    return replace(dataset, problems=problems_of(train), remarks=remarks + dataset.remarks)


def _roles(name: str, sets: "dict[str, Dataset]", config: DataSection) -> dict[str, str]:
    roles = find_splits(list(sets), config.splits, name)
    if "train" in roles:
        return roles
    others = [split for split in sets if split not in roles.values()] or list(roles.values())
    if len(others) != 1 or config.splits:
        raise UserError(
            f"data.path: {name} has no split train to learn from, but {', '.join(sets) or 'none'}: name it, e.g. "
            f"'data.splits={{train: {next(iter(sets), 'NAME')}}}'"
        )
    return {role: split for role, split in roles.items() if split != others[0]} | {"train": others[0]}


# --- reading


def _open(path: Path | None) -> tuple[str, "dict[str, Dataset]"]:
    """The name and splits of the set that `data.path` names."""
    if path is None:
        raise UserError(
            "data.path is missing: set it to a data set on the hub, e.g. laolao77/ViRFT_CLS_flower_4_shot, or to a "
            "folder of save_to_disk or of parquet files"
        )
    if not path.exists() and not HUB_NAME.fullmatch(path.as_posix()):
        raise UserError(
            f"data.path: {path} is neither a file or folder nor a name on the hub of the form owner/name"
            f"{near_path(path)}"
        )
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    files = _parquet_files(path) if path.exists() and not saved else {}

    import datasets  # takes seconds to import
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    # Otherwise `datasets` contacts a download-counting server on each load, even of a local folder: seconds offline.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `datasets` prints errors that it also raises
    try:
        if not path.exists():
            found = datasets.load_dataset(path.as_posix())
        elif saved:
            _check_saved(path)
            found = datasets.load_from_disk(str(path))
        else:
            escaped = {split: [glob.escape(str(file)) for file in named] for split, named in files.items()}
            found = datasets.load_dataset("parquet", data_files=escaped)
    except DatasetNotFoundError as error:
        raise UserError(
            f"data.path: {path} is no folder here, and the hub has no such data set or does not show it to you "
            f"({error}). Check the name; for a private or gated one log in with: hf auth login{near_path(path)}"
        ) from error
    except ConnectionError as error:
        raise (UserError if datasets.config.HF_HUB_OFFLINE else Unavailable)(
            f"data.path: {path} is no folder here, and the hub cannot be reached ({error}). Where it can be, run:\n"
            f"  python -c \"import datasets; datasets.load_dataset('{path.as_posix()}').save_to_disk('saved')\"\n"
            f"Bring the folder saved/ here and set data.path to it{near_path(path)}"
        ) from error
    except (DatasetsError, OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise UserError(
            f"data.path: {path} cannot be read as a data set ({error}). It must be a folder of save_to_disk, a folder "
            f"of parquet files, one such file, or a name on the hub"
        ) from error
    splits = found if isinstance(found, dict) else {"train": found}
    return path.name, {str(split): rows.with_format(None) for split, rows in splits.items()}


def _check_saved(folder: Path) -> None:
    """Refuse a folder of `save_to_disk` whose JSON files name paths outside it: `datasets` would open them."""
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


def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """The parquet files of each split. A single file is the training split.

    Raises:
        UserError: there are none (the message names the source that reads the files found), or they belong to several
            configurations of one set.
    """
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            raise UserError(f"data.path: {path} is a table: set data.source=csv")
        return {"train": [path]}
    root = path.resolve()
    files = []
    for folder, inner, names in walk(path):
        inner[:] = [name for name in inner if not _is_hidden(Path(name))]
        files += [folder / name for name in names if not _is_hidden(Path(name)) and (folder / name).is_file()]
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    if not parquet:
        tables = [file for file in files if file.suffix.lower() in TABLE_SUFFIXES]
        cure = f". For a table of images and labels: data.source=csv data.path={tables[0]}" if tables else ""
        if any(map(is_picture, files)):
            cure = f". For pictures in folders: data.source=folder{cure}"
        raise UserError(
            f"data.path: {path} holds no parquet files, so it cannot be read as a data set of Hugging Face{cure}"
        )
    outside = [str(file) for file in parquet if not file.resolve().is_relative_to(root)]
    if outside:
        raise UserError(f"data.path: {path} holds links out of it; put the files themselves there:\n{listing(outside)}")
    folders = sorted({file.parent.relative_to(path) for file in parquet})
    several = sorted({_configuration(folder) for folder in folders})
    if len(several) > 1:
        lines = listing([f"data.path={path / folder}" for folder in several])
        raise UserError(
            f"data.path: {path} holds several configurations of a set, which are not to be mixed; choose one:\n{lines}"
        )
    splits: dict[str, list[Path]] = {}
    for file in sorted(parquet):
        splits.setdefault(_split_of(file.relative_to(path)), []).append(file)
    return splits if set(splits) & set(ROLES) else {"train": sorted(parquet)}


def _split_of(file: Path) -> str:
    """The split in the file's folder or name, e.g. "train"; else the file's name without its shard number."""
    for folder in reversed(file.parts[:-1]):
        if role := split_role(folder):
            return role
    roles = {role for word in re.split(r"[\W_]+", file.stem) if (role := split_role(re.sub(r"\d+$", "", word)))}
    name = re.sub(r"\W+", "_", re.sub(r"[-_.]?\d+(-of-\d+)?$", "", file.stem)).strip("_")
    return roles.pop() if len(roles) == 1 else name or "other"


def _configuration(folder: Path) -> Path:
    """The configuration's folder for parquet files in `folder`: the path without trailing split names and `data`."""
    parts = list(folder.parts)
    while parts and (split_role(parts[-1]) or parts[-1].casefold() == "data"):
        parts.pop()
    return Path(*parts)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or is_system(Path(part)) for part in path.parts)


# --- held-out images


def _check_left_over(name: str, labels: list[str], config: DataSection) -> None:
    left = sum(max(0, images - config.shots) for images in Counter(labels).values())
    wanted = config.validation + config.test
    if left < wanted and left <= 0:
        raise UserError(
            f"{name} has only its {len(labels)} training images and no test split, but data.validation is "
            f"{config.validation} and data.test {config.test}. Set both to 0, or data.held_out to a Flower102 archive "
            f"to draw them from (data.download=true fetches it)"
        )


def _with_archive(dataset: FewShotDataset, config: DataSection, seed: int) -> FewShotDataset:
    name = dataset.name
    where = official_archive() if takes_official(config) else config.held_out
    archive = open_archive(where, "data.held_out", config.max_bytes)
    own_label = {normalise_label(label): label for label in dataset.classes}
    theirs = {normalise_label(example.label): example.label for example in archive.examples}
    lines = [f"{own_label[key]!r} is in {name} only" for key in sorted(own_label.keys() - theirs.keys())]
    lines += [f"{theirs[key]!r} is in the archive only" for key in sorted(theirs.keys() - own_label.keys())]
    if config.only:  # leave out the archive's other classes
        lines = lines[: len(own_label.keys() - theirs.keys())]
    if lines:
        raise UserError(f"data.held_out: its classes and those of {name} differ:\n{listing(lines)}")

    known, bad = _known_pictures(dataset, archive)
    skip_or_refuse(bad, f"{len(archive.examples)} images in {archive.where}", config)
    shared = {label: own_label[key] for key, label in theirs.items() if key in own_label}
    left = replace(archive, skipped=bad).named(shared).without(known)
    held_out = split_and_read(name, left, dataset.classes, replace_keys(config, shots=0), seed)
    return dataset.with_held_out(replace(held_out, copies=known | held_out.copies))


def _known_pictures(dataset: FewShotDataset, candidates: Unread) -> tuple[dict[str, str], dict[str, str]]:
    """Find the candidates that show a training picture, perhaps re-encoded or rescaled, so that digests differ.

    All pairs are compared by small copies, whose distance hardly changes with encoding and scale. Returns two mappings:
    from such a candidate's id to the id of that picture, and from an unreadable one's id to the reason.
    """
    small = np.stack([small_copy(dataset.image(example)) for example in dataset.train])  # [train, SIDE * SIDE * 3]
    known, bad = {}, {}
    for candidate in candidates.examples:
        try:
            differences = small - small_copy(candidates.read(candidate.example_id))
        except DECODE_ERRORS as error:
            bad[candidate.example_id] = f"damaged or unsupported ({error})"
            continue
        distances = np.square(differences).mean(axis=1)
        nearest = int(distances.argmin())
        if distances[nearest] <= SAME_PICTURE**2:
            known[candidate.example_id] = dataset.train[nearest].example_id
    return known, bad
