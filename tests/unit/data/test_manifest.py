import hashlib
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import FewShotDataset, few_shot_split, load_dataset
from rft_cluster.data.dataset import LabelledImage
from rft_cluster.data.images import FORMATS, open_image
from rft_cluster.data.manifest import OtherData, check_manifest, manifest, read_manifest
from tests.unit.data.test_archive import write_archive
from tests.unit.data.test_hub import flower_set, rows, save

CLASSES = ("daisy", "rose", "tulip")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (number % 256, number // 256, 40)).save(file, "PNG")
    return file.getvalue()


def write_photos(root: Path, start: int = 0, classes=CLASSES) -> Path:
    for i, label in enumerate(label for label in classes for _ in range(9)):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{i:02d}.png").write_bytes(png(start + i))
    return root


def section(**values) -> DataSection:
    return DataSection(**{"source": "folder", "shots": 2, "validation": 4, "test": 5, **values})


def write(path: Path, config: DataSection, seed: int) -> tuple[FewShotDataset, Path]:
    """A data set, and its manifest in a file as a run leaves it."""
    dataset = load_dataset(config, seed)
    path.write_text(json.dumps(manifest(dataset, seed)))
    return dataset, path


def own(config: DataSection, seed: int) -> FewShotDataset:
    """A source of one's own that knows nothing of manifests."""
    examples = [LabelledImage(f"{i:02d}", png(i), "ab"[i % 2]) for i in range(20)]
    order = np.random.default_rng(seed).permutation(20)
    chosen = [examples[i] for i in order]
    return FewShotDataset.of("own", ["a", "b"], chosen[:6], chosen[6:9], chosen[9:12], [e.image for e in chosen[12:]])


def own_split(config: DataSection, seed: int) -> FewShotDataset:
    examples = [LabelledImage(f"{i:02d}", png(i), "ab"[i % 2]) for i in range(20)]
    return few_shot_split("own", examples, ["a", "b"], config, seed)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict]:
    """A configuration for every kind of source."""
    root = tmp_path_factory.mktemp("sources")
    archive = write_archive(root / "flowers")
    noise = np.random.default_rng(0)
    for path in sorted((archive / "jpg").iterdir()):
        small = Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((48, 32), Image.Resampling.BICUBIC).save(path, quality=90)
    apart = write_photos(root / "apart/train").parent
    write_photos(apart / "test", start=100)
    (apart / "test/rose/copy.png").write_bytes((apart / "train/rose/10.png").read_bytes())
    splits = datasets.DatasetDict(train=rows(["a", "b"] * 10), test=rows(["a", "b"] * 10, start=50))
    return {
        "digits": {"source": "digits"},
        "folder": {"path": write_photos(root / "photos")},
        "folder with test": {"path": apart},
        "archive": {"source": "flower102", "path": archive},
        "hub": {"source": "huggingface", "path": save(rows(["a", "b"] * 10), root / "hub")},
        "hub with test": {"source": "huggingface", "path": save(splits, root / "hub_with_test")},
        "hub and archive": {
            **{"source": "huggingface", "path": flower_set(archive, root / "hub_and_archive"), "held_out": archive},
            "shots": 1,
        },
        "own": {"source": f"{__name__}:own"},
        "own split": {"source": f"{__name__}:own_split"},
    }


SOURCES = ["digits", "folder", "folder with test", "archive", "hub", "hub with test", "hub and archive", "own"]
SOURCES += ["own split"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_manifest_repeats_the_split_exactly(sources, source, tmp_path):
    config = section(**sources[source])
    first, path = write(tmp_path / "manifest.json", config, seed=3)
    # Another seed and other numbers of images: all of that comes from the manifest.
    again = section(**{**sources[source], "shots": 1, "validation": 1, "test": 1}, manifest=path)
    assert load_dataset(again, 11) == first
    assert load_dataset(config, 11).splits != first.splits


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_seed_gives_the_same_manifest_byte_for_byte(sources, source):
    config = section(**sources[source])
    one, two = (json.dumps(manifest(load_dataset(config, 5), 5)) for _ in range(2))
    assert one == two


def test_a_manifest_says_all_and_names_the_files_as_sha256sum_does(tmp_path):
    root = write_photos(tmp_path / "photos")
    (root / "rose/copy.png").write_bytes((root / "rose/10.png").read_bytes())
    (root / "tulip/cut.png").write_bytes(png(0)[:40])
    config = section(path=root, on_bad_image="skip", aliases={"rose": ["dog rose"]})
    dataset, path = write(tmp_path / "manifest.json", config, seed=2)
    found = read_manifest(path)
    assert list(found) == ["name", "seed", "classes", "aliases", "splits", "skipped", "copies", "left_out", "levels"]
    assert (found["name"], found["seed"], found["classes"]) == ("photos", 2, list(CLASSES))
    assert found["aliases"] == {"rose": ["dog rose"]}
    assert found["copies"] == {"rose/copy.png": "rose/10.png"}
    assert list(found["skipped"]) == ["tulip/cut.png"] and "not an image" in found["skipped"]["tulip/cut.png"]
    entries = [entry for split in ("train", "validation", "test") for entry in found["splits"][split]]
    assert [e.example_id for split in dataset.splits.values() for e in split] == [entry["id"] for entry in entries]
    lines = subprocess.run(["sha256sum", *(e["id"] for e in entries)], cwd=root, capture_output=True, text=True).stdout
    assert lines.splitlines() == [f"{entry['sha256']}  {entry['id']}" for entry in entries]
    assert all(entry["label"] == entry["id"].split("/")[0] for entry in entries)


def test_every_difference_is_listed_at_once(tmp_path):
    root = write_photos(tmp_path / "photos")
    dataset, path = write(tmp_path / "manifest.json", section(path=root), seed=0)
    gone, changed, cut, copied = (e.example_id for e in (*dataset.train[:2], dataset.validation[0], dataset.test[0]))
    spare = next(e for e in sorted(root.glob("*/*.png")) if str(e.relative_to(root)) not in path.read_text())
    (root / gone).unlink()
    (root / changed).write_bytes(png(999))
    (root / cut).write_bytes(b"cut")
    again = section(path=root, manifest=path, on_bad_image="skip")
    with pytest.raises(UserError) as caught:
        load_dataset(again, 0)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("data.manifest: the data are not those of the manifest.")
    assert lines == [
        f"  train: {gone}: missing",
        f"  train: {changed}: its bytes have changed (another sha256)",
        f"  validation: {cut}: cannot be used: not an image in one of the formats {', '.join(FORMATS)}",
    ]
    # Another encoding of the same picture is another file, too.
    write_photos(root)
    open_image((root / copied).read_bytes()).save(root / copied, "BMP")
    with pytest.raises(UserError, match=f"\n  test: {copied}: its bytes have changed"):
        load_dataset(again, 0)
    write_photos(root)
    spare.unlink()  # what no split used may go
    assert load_dataset(again, 0).test == dataset.test


@pytest.mark.parametrize("change", ["renamed", "removed"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_class_that_is_gone_is_said_to_be(count, change, tmp_path):
    root = write_photos(tmp_path / "photos")
    _, path = write(tmp_path / "manifest.json", section(path=root), seed=0)
    for label in CLASSES[:count]:
        (root / label).rename(root / f"{label}s" if change == "renamed" else tmp_path / label)
    (root / "beside").mkdir()  # so that folders of classes are left, whatever is removed
    write_photos(root, start=300, classes=("beside", "other"))
    with pytest.raises(OtherData) as caught:
        load_dataset(section(path=root, manifest=path), 0)
    there = sorted(folder.name for folder in root.iterdir())
    assert caught.value.problems.splitlines() == [
        *(f"  class {label!r} is gone" for label in CLASSES[:count]),
        *(f"  class {label!r} is new" for label in there if label not in CLASSES),
    ]


def test_new_images_and_new_copies_change_nothing(tmp_path):
    root = write_photos(tmp_path / "photos")
    dataset, path = write(tmp_path / "manifest.json", section(path=root), seed=0)
    taken = dataset.test[0]
    (root / taken.label / "00_first.png").write_bytes(
        dataset.image(taken)
    )  # comes first in the folder, is yet the copy
    (root / "rose/new.png").write_bytes(png(500))
    again = load_dataset(section(path=root, manifest=path), 0)
    assert again.splits == dataset.splits and len(again.pool) == len(dataset.pool) + 1
    assert again.copies == {f"{taken.label}/00_first.png": taken.example_id}
    (root / "lily").mkdir()
    (root / "lily/1.png").write_bytes(png(600))
    beside = load_dataset(section(path=root, manifest=path), 0)  # a class more does not matter either
    assert (beside.classes, beside.splits) == (dataset.classes, dataset.splits)


def test_the_aliases_of_a_manifest_are_those_that_count(tmp_path):
    """Not those of a class that `data.only` leaves out."""
    config = section(path=write_photos(tmp_path), only=list(CLASSES[:2]),
                     aliases={CLASSES[0]: ["first"], CLASSES[2]: ["third"]})  # fmt: skip
    assert manifest(load_dataset(config, 0), 0)["aliases"] == {CLASSES[0]: ["first"]}


def test_check_manifest_sees_labels_order_and_extra_images():
    config = section(source=f"{__name__}:own")
    dataset = load_dataset(config, 1)
    found = manifest(dataset, 1)
    check_manifest(dataset, found)

    def message(other: FewShotDataset) -> str:
        with pytest.raises(UserError) as caught:
            check_manifest(other, found)
        return str(caught.value)

    first, *rest = dataset.train
    wrong = replace(first, label={"a": "b", "b": "a"}[first.label])
    expected = f"train: {first.example_id}: its label was {first.label!r} and is {wrong.label!r}"
    assert message(replace(dataset, train=[wrong, *rest])).endswith(f"\n  {expected}")
    assert message(replace(dataset, train=[*rest, first])).endswith("\n  train: the same images in another order")
    extra = [*dataset.test, LabelledImage("new", png(77), "a")]
    assert message(replace(dataset, test=extra)).endswith("\n  test: new: not in the manifest")
    copied = replace(dataset, train=rest, copies={first.example_id: "other"})
    assert message(copied).endswith(f"\n  train: {first.example_id}: now a copy of other")
    assert message(replace(dataset, classes=["b", "a"])).endswith("\n  the classes stand in another order")
    # Moved from one split to another it is missing in one and new in the other.
    moved = message(replace(dataset, train=rest, test=[*dataset.test, first])).splitlines()[1:]
    assert moved == [f"  train: {first.example_id}: missing", f"  test: {first.example_id}: not in the manifest"]


def test_a_hub_set_without_the_training_images_is_explained(sources, tmp_path):
    for source in ("hub", "hub with test", "hub and archive"):
        config = section(**sources[source])
        _, path = write(tmp_path / "manifest.json", config, seed=0)
        found = json.loads(path.read_text())
        for entry in found["splits"]["train"]:
            entry["id"] = entry["id"].replace("train/", "train/9")
        path.write_text(json.dumps(found))
        with pytest.raises(UserError, match=r"data.manifest: the data are not those .*\n  train: train/9\d+: missing"):
            load_dataset(config.model_copy(update={"manifest": path}), 0)


GOOD = {
    **{
        "name": "x",
        "seed": 0,
        "classes": ["a", "b"],
        "aliases": {},
        "skipped": {},
        "copies": {},
        "left_out": [],
        "levels": None,
    },
    "splits": {"train": [{"id": "1", "sha256": "0" * 64, "label": "a"}], "validation": [], "test": []},
}


def changed(**values) -> bytes:
    return json.dumps({**GOOD, **values}).encode()


def entry(**values) -> dict:
    return {"id": "1", "sha256": hashlib.sha256(b"").hexdigest(), "label": "a", **values}


def splits(**values) -> bytes:
    return changed(splits={"train": [entry()], "validation": [], "test": [], **values})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not the manifest of a run \(its manifest.json\):\n  file: Invalid JSON"),
        (b"\xff\xfe", "not the manifest"),
        (b"[" * 100_000, "not the manifest"),
        (b"[]", "not the manifest"),
        (b"{}", r"\n  name: Field required\n  seed: Field required\n"),
        (changed(seed="0"), r"\n  seed: Input should be a valid integer"),
        (changed(splits={"train": []}), r"\n  splits.train: List should have at least 1 item"),
        (splits(test=[entry(id=7)]), r"\n  splits.test.0.id: Input should be a valid string"),
        (splits(test=[entry(id="2", sha256="ABC")]), r"\n  splits.test.0.sha256: String should match"),
        (splits(test=[entry()]), r"contradicts itself:\n  1: named 2 times"),
        (splits(test=[entry(id="2", label="c")]), r"contradicts itself:\n  2: 'c' is none of the classes"),
    ],
)
def test_a_malformed_manifest_is_explained(content, message, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_manifest(path)
    with pytest.raises(UserError, match=message):
        load_dataset(section(source="digits", manifest=path), 0)


def test_a_manifest_that_cannot_be_read_is_explained(tmp_path):
    for path, message in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"data.manifest: {path} cannot be read: {message}"):
            read_manifest(path)


def test_what_others_add_to_a_manifest_is_left_alone(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(changed(note="mine"))
    assert read_manifest(path) == GOOD
