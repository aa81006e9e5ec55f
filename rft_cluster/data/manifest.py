"""The manifest of a run: every image that it trains and tests on, and the check that other data are equal.

    {"name": "photos", "seed": 0, "classes": ["rose", "tulip"], "aliases": {"rose": ["dog rose"]},
     "splits": {"train": [{"id": "rose/a.jpg", "sha256": "9f86...", "label": "rose"}, ...],
                "validation": [...], "test": [...]},
     "skipped": {"tulip/cut.png": "damaged or unsupported (...)"}, "copies": {"rose/b.jpg": "rose/a.jpg"},
     "left_out": ["rose/c.jpg"], "levels": [0, 4095]}

`left_out` are images that were drawn and are not used, nor in the pool; `FewShotDataset.left_out`.
`levels` are the 16-bit values shown as black and white; null without 16-bit pictures.
`sha256` is the hash of the encoded bytes, as `sha256sum` prints it. Ids are only compared, never opened as paths.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import check_format, json_object
from rft_cluster.common.lookup import near_path
from rft_cluster.data.dataset import FewShotDataset, listing
from rft_cluster.data.deep import FULL
from rft_cluster.messages import Example


class OtherData(UserError):
    """The data differ from a manifest; `problems` lists the differences."""

    def __init__(self, problems: str) -> None:
        super().__init__(
            f"data.manifest: the data are not those of the manifest. Bring those back, or leave data.manifest out to "
            f"draw new splits:\n{problems}"
        )
        self.problems = problems


class _Entry(BaseModel):
    id: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    label: str


class _Splits(BaseModel):
    train: Annotated[list[_Entry], Field(min_length=1)]
    validation: list[_Entry]
    test: list[_Entry]


class _Manifest(BaseModel):
    name: str
    seed: int
    classes: list[str]
    aliases: dict[str, list[str]]
    splits: _Splits
    skipped: dict[str, str]
    copies: dict[str, str]
    left_out: list[str] = []
    # Manifests of earlier versions lack `levels`: black and white were 0 and 65535.
    levels: tuple[int, int] | None = FULL


def manifest(dataset: FewShotDataset, seed: int) -> dict[str, Any]:
    """The manifest of a data set, for `json.dumps`. Equal data sets give equal manifests. `seed` chose the splits."""
    return {
        "name": dataset.name,
        "seed": seed,
        "classes": list(dataset.classes),
        "aliases": dataset.aliases,
        "splits": {
            split: [{"id": e.example_id, "sha256": e.image.sha256, "label": e.label} for e in examples]
            for split, examples in dataset.splits.items()
        },
        "skipped": dict(dataset.skipped),
        "copies": dict(dataset.copies),
        "left_out": list(dataset.left_out),
        "levels": dataset.levels,
    }


def read_manifest(file: Path) -> dict[str, Any]:
    """Read a manifest from a file, in the form that `manifest` returns. Unknown keys are dropped.

    Raises:
        UserError: the file cannot be read, is not a manifest, names an image twice, or has a label that is no class.
    """
    try:
        text = file.read_bytes()
        if values := json_object(text):
            check_format(values, file)
        found = _Manifest.model_validate_json(text, strict=True).model_dump()
    except OSError as error:
        raise UserError(f"data.manifest: {file} cannot be read: {error.strerror}{near_path(file)}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors()]
        raise UserError(
            f"data.manifest: {file} is not the manifest of a run (its manifest.json):\n{listing(lines)}"
        ) from error
    entries = [entry for split in found["splits"].values() for entry in split]
    lines = [f"{i}: named {n} times" for i, n in Counter(entry["id"] for entry in entries).items() if n > 1]
    lines += [
        f"{e['id']}: {e['label']!r} is none of the classes" for e in entries if e["label"] not in found["classes"]
    ]
    if lines:
        raise UserError(f"data.manifest: {file} contradicts itself:\n{listing(lines)}")
    return found


def unseen_in(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The classes of a manifest without a training image, as `FewShotDataset.unseen`."""
    trained = {entry["label"] for entry in manifest["splits"]["train"]}
    return tuple(label for label in manifest["classes"] if label not in trained)


def check_manifest(dataset: FewShotDataset, manifest: dict[str, Any]) -> None:
    """Check that a data set has the manifest's classes and splits, in the same order and with the same bytes.

    The name, the seed, the aliases, and images outside the splits may differ.

    Raises:
        OtherData: something differs; the message lists all differences.
    """
    problems = []
    if dataset.classes != manifest["classes"]:
        problems += [f"class {label!r} is new" for label in dataset.classes if label not in manifest["classes"]]
        problems += [f"class {label!r} is gone" for label in manifest["classes"] if label not in dataset.classes]
        problems = problems or ["the classes stand in another order"]
    for split, examples in dataset.splits.items():
        problems += _differences(split, examples, manifest["splits"][split], dataset)
    if problems:
        raise OtherData(listing(problems))


def _differences(
    split: str, examples: list[Example], entries: list[dict[str, str]], dataset: FewShotDataset
) -> list[str]:
    found = {example.example_id: example for example in examples}
    problems = []
    for entry in entries:
        where, example = f"{split}: {entry['id']}", found.pop(entry["id"], None)
        if example is None:
            skipped, copied = dataset.skipped.get(entry["id"]), dataset.copies.get(entry["id"])
            reason = f"cannot be used: {skipped}" if skipped else f"now a copy of {copied}" if copied else "missing"
            problems.append(f"{where}: {reason}")
        elif example.label != entry["label"]:
            problems.append(f"{where}: its label was {entry['label']!r} and is {example.label!r}")
        elif example.image.sha256 != entry["sha256"]:
            problems.append(f"{where}: its bytes have changed (another sha256)")
    problems += [f"{split}: {example_id}: not in the manifest" for example_id in found]
    if not problems and [e.example_id for e in examples] != [entry["id"] for entry in entries]:
        problems.append(f"{split}: the same images in another order")
    return problems
