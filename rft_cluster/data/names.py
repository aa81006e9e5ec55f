"""Names of splits and classes: usual words for splits, names for numbered labels, number prefixes, `data.only`."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import nearest
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import LISTED, composed, listing
from rft_cluster.data.manifest import OtherData, read_manifest

T = TypeVar("T")
ROLES = ("train", "validation", "test")
SPLIT_WORDS = {
    "train": {"train", "training", "trn"},
    "validation": {"val", "valid", "validation", "dev", "development"},
    "test": {"test", "testing", "tst"},
}
BEFORE_SPLIT = re.compile(r"^\d+[\W_]+")  # 1-train, 02_test
# Endings that people add to those words: train_set, Test Images, val-data.
SPLIT_ENDINGS = re.compile(r"(?<=.)[\W_]*(set|sets|split|data|images|imgs|pictures|photos)$")
MISSING = ("", "nan", "<na>", "nat", "null", "#n/a")
# These may mean a missing label or a class ("None": no defect), so they are kept and noted.
DOUBTFUL = ("none", "na", "n/a", "n.a.")
WHOLE = re.compile(r"\d{1,18}(\.0*)?")  # pandas writes 1.0 where a label of the column is missing
# A number or code and a separator before the name: 001.Albatross, n02085620-Chihuahua, 12_oak.
PREFIX = re.compile(r"([A-Za-z]?\d+)[\s._-]+([^\W\d_].+)", re.DOTALL)


def split_role(name: str) -> str | None:
    """The split that a name means: "train", "validation", "test" or None. `name` is a folder, split or table value."""
    word = SPLIT_ENDINGS.sub("", BEFORE_SPLIT.sub("", name.strip().casefold()))
    return next((role for role, words in SPLIT_WORDS.items() if word in words), None)


def find_splits(names: Sequence[str], wanted: Mapping[Any, str], where: str) -> dict[str, str]:
    """Map each split to its name among `names`: by `wanted` (`data.splits`) if given, else by the usual words.

    Raises:
        UserError: `data.splits` has a name that is missing, or two names mean one split.
    """
    if wanted:
        missing = [name for name in wanted.values() if name not in names]
        if missing:
            raise UserError(
                f"data.splits: {where} has no {missing[0]!r}; it has {', '.join(names[:LISTED]) or 'nothing'}"
            )
        return {role: wanted[role] for role in ROLES if role in wanted}
    found: dict[str, list[str]] = {role: [name for name in names if split_role(name) == role] for role in ROLES}
    for role, several in found.items():
        if len(several) > 1:
            raise UserError(
                f"data.path: {where} has {' and '.join(several)}, which both mean the split {role}: say which with "
                f"data.splits, e.g. 'data.splits={{{role}: {several[0]}}}', or remove one"
            )
    return {role: several[0] for role, several in found.items() if several}


def stripped_names(found: Iterable[str]) -> dict[str, str] | None:
    """Map each class to its name without the number or code before it.

    None unless every class has such a prefix, and both the prefixes and the remaining names are distinct.
    """
    matches = {label: PREFIX.fullmatch(label) for label in found}
    parts = {label: match.groups() for label, match in matches.items() if match}
    if len(parts) < len(matches) or len(parts) < 2:
        return None
    for i in (0, 1):
        if max(Counter(part[i] for part in parts.values()).values()) > 1:
            return None
    return {label: name for label, (_, name) in parts.items()}


def chosen_names(found: Sequence[str], config: DataSection) -> dict[str, str]:
    """Map each class in use to its name in the run, after `data.strip_prefix`, `data.only` and `data.manifest`.

    Raises:
        UserError: `data.strip_prefix` is set but not every class has a prefix, or `data.only` names a missing class.
        OtherData: a class of `data.manifest` is missing.
    """
    names = {label: composed(label) for label in found}
    if config.strip_prefix:
        stripped = stripped_names(names.values())
        if stripped is None:
            without = [repr(label) for label in names.values() if not PREFIX.fullmatch(label)]
            problem = f"these do not:\n{listing(without)}" if without else "some would be the same without it"
            raise UserError(
                f"data.strip_prefix is set, but it needs a number or code of its own before every class name; {problem}"
            )
        names = {label: stripped[name] for label, name in names.items()}
    if config.only is None and config.manifest:  # classes that the manifest does not have are ignored
        earlier = read_manifest(config.manifest)["classes"]
        if gone := [f"class {label!r} is gone" for label in earlier if label not in names.values()]:
            # A renamed class shows up as one that is gone and one that is new.
            new = [f"class {name!r} is new" for name in names.values() if name not in earlier]
            raise OtherData(listing([*gone, *new]))
        return {label: name for label, name in names.items() if name in earlier}
    if config.only is None:
        return names
    wanted = [composed(label) for label in config.only]
    known = list(names.values())
    for label in wanted:
        if label not in known:
            near = nearest(label, known)
            cure = f"did you mean {near!r}?" if near else f"there are {', '.join(map(repr, known[:LISTED]))}"
            raise UserError(f"data.only: {label!r} is none of the classes; {cure}")
    return {label: name for label, name in names.items() if name in wanted}


def name_notes(found: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Notes for the user about unused classes, doubtful names and number prefixes."""
    notes = []
    if len(names) < len(found):
        why = "data.only or a manifest names them"
        notes.append(f"{len(names)} of {len(found)} classes are used ({why}), images of the others are left out")
    for label in names.values():
        if label.casefold() in DOUBTFUL:
            notes.append(
                f"{label!r} is learned as a class like the others: where it means that there is no label, leave those "
                f"images out, or name the classes to use in data.only"
            )
    stripped = stripped_names(names.values())
    if stripped:
        label, name = next(iter(stripped.items()))
        notes.append(
            f"all class names begin with a number or code ({label!r}), and an answer is only right with it: "
            f"set data.strip_prefix=true to have {name!r} asked for, or give the names as data.aliases"
        )
    return notes


def given(label: str, classes: list[str] | None) -> str | None:
    """The label, or None for a missing-value mark such as "nan", unless `classes` has that very name."""
    return None if label.casefold() in MISSING and label not in (classes or ()) else label


def named_numbers(labels: list[str | None], classes: list[str] | None) -> list[str | None]:
    """Replace label n by the n-th of `classes`, counted from 0, if all labels are integers and `classes` are names.

    Labels stay as they are without `classes` (`data.classes`), or if `classes` holds the numbers themselves.
    """
    numbers = {label for label in labels if label}
    if not classes or not numbers or not all(map(WHOLE.fullmatch, numbers)) or numbers <= set(classes):
        return labels
    labels = [label and label.partition(".")[0] for label in labels]
    numbers = {label for label in labels if label}
    if max(map(int, numbers)) >= len(classes):
        raise UserError(
            f"data.classes gives {len(classes)} names for the labels 0 to {len(classes) - 1}, but there is a label "
            f"{max(numbers, key=int)}"
        )
    return [classes[int(label)] if label else None for label in labels]
