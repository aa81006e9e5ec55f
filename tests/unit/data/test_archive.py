import contextlib
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from rft_cluster.common.errors import UserError
from rft_cluster.common.labels import normalise_label
from rft_cluster.config import DataSection
from rft_cluster.data import archive, load_dataset, manifest
from rft_cluster.data.archive import flower_classes, open_archive
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.images import MAX_BYTES, Limits, check_image

CLASSES = 102
EACH = 4


def save_labels(root: Path, labels: object) -> None:
    savemat(root / "imagelabels.mat", {"labels": labels}, do_compression=True)


def write_archive(root: Path) -> Path:
    """The official layout with 4 tiny images of each class: image n has label (n - 1) % 102 + 1."""
    (root / "jpg").mkdir(parents=True)
    count = CLASSES * EACH
    for number in range(1, count + 1):
        picture = Image.new("RGB", (8, 8), (number // 256 * 99, number % 256, 7))
        # Of nearly equal pictures the compressed bytes may be equal; the comment tells them apart.
        picture.save(root / "jpg" / f"image_{number:05d}.jpg", comment=f"{number:05d}")
    save_labels(root, np.arange(count, dtype=np.uint8 if count < 256 else np.uint16)[None] % CLASSES + 1)
    # Of each class two images for training; one more of every second class for validation; the rest for the test.
    own = np.random.default_rng(0).permuted(np.arange(count).reshape(EACH, CLASSES), axis=0) + 1
    parts = {"trnid": own[:2].reshape(1, -1), "valid": own[2:3, ::2], "tstid": np.append(own[2, 1::2], own[3])[None]}
    savemat(root / "setid.mat", parts, do_compression=True)
    return root


def official(root: Path, split: str) -> set[str]:
    return {f"jpg/image_{number:05d}.jpg" for number in loadmat(root / "setid.mat")[split].ravel()}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_archive(tmp_path_factory.mktemp("original") / "flowers")


@pytest.fixture
def root(original, tmp_path) -> Path:
    """An archive to change."""
    return Path(shutil.copytree(original, tmp_path / "flowers"))


def load(root: Path | None, seed: int = 0, **values) -> FewShotDataset:
    section = {"source": "flower102", "path": root, "shots": 1, "validation": 30, "test": 150, **values}
    return load_dataset(DataSection(**section), seed)


def refusal(root: Path | None, **values) -> str:
    with pytest.raises(UserError) as caught:
        load(root, **values)
    return str(caught.value)


def test_the_class_names_are_those_of_the_archive_in_its_order():
    names = flower_classes()
    assert (len(names), names[0], names[1], names[73], names[101]) == (
        *(102, "pink primrose", "hard-leaved pocket orchid", "rose"),
        "blackberry lily",
    )
    assert len(set(map(normalise_label, names))) == 102


def test_an_archive_is_a_data_set(root):
    dataset = load(root)
    assert dataset.name == "flower102" and dataset.classes == flower_classes()
    assert Counter(e.label for e in dataset.train) == Counter(flower_classes())
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [102, 30, 150]
    assert {dataset.image(e) for e in dataset.train} < set(dataset.pool)
    assert not {dataset.image(e) for e in (*dataset.validation, *dataset.test)} & set(dataset.pool)
    for split, variable in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        assert {e.example_id for e in dataset.splits[split]} <= official(root, variable)
    chosen = [*dataset.train, *dataset.validation, *dataset.test]
    assert len({e.example_id for e in chosen}) == len(chosen)
    for example in chosen:
        number = int(example.example_id.removeprefix("jpg/image_").removesuffix(".jpg"))
        assert dataset.image(example) == (root / example.example_id).read_bytes()
        assert example.label == flower_classes()[(number - 1) % CLASSES]


def test_the_seed_alone_decides(root):
    assert load(root, seed=3) == load(root, seed=3)
    assert load(root, seed=3).train != load(root, seed=4).train


def test_only_the_chosen_images_are_decoded(root, monkeypatch):
    decoded = []

    def spy(data: bytes, where: str, limits: Limits) -> str:
        decoded.append(where)
        return check_image(data, where, limits)

    monkeypatch.setattr("rft_cluster.data.reading.check_image", spy)
    dataset = load(root, validation=0, test=5)
    assert sorted(decoded) == sorted(e.example_id for e in [*dataset.train, *dataset.test])
    # A damaged image that is not chosen does no harm; a chosen one is named.
    unused = next(e for e in open_archive(root, "", MAX_BYTES).examples if e.example_id not in decoded)
    (root / unused.example_id).write_bytes(b"not an image")
    assert load(root, validation=0, test=5).splits == dataset.splits
    (root / dataset.test[0].example_id).write_bytes(b"not an image either")
    message = refusal(root, validation=0, test=5)
    assert "1 of the 5 images chosen" in message and f"  {dataset.test[0].example_id}: not an image" in message


def test_bad_images_that_are_chosen_are_skipped_and_others_drawn(root):
    # With 2 shots each class's 2 training images are wanted, so bad ones must come up; 1 shot leaves one to spare.
    bad = sorted(official(root, "trnid"))[:3] + sorted(official(root, "tstid"))[:2]
    for number, name in enumerate(bad):
        (root / name).write_bytes(b"not an image" + bytes([number]))
    lines = refusal(root, shots=2).splitlines()
    assert lines[0].startswith("3 of the 204 images chosen from data.path") and "on_bad_image=skip" in lines[0]
    assert sorted(line.strip().split(":")[0] for line in lines[1:]) == bad[:3]
    short = {flower_classes()[(int(name[-9:-4]) - 1) % CLASSES] for name in bad[:3]}
    expected = [f"  {label!r}: 1, and 1 skipped that cannot be used" for label in flower_classes() if label in short]
    assert refusal(root, shots=2, on_bad_image="skip").splitlines()[1:] == expected
    dataset = load(root, test=151, on_bad_image="skip")
    assert set(bad[3:]) <= set(dataset.skipped) <= set(bad)
    chosen = [e for split in dataset.splits.values() for e in split]
    assert len(chosen) == 102 + 30 + 151 and not {e.example_id for e in chosen} & set(bad)
    assert Counter(e.label for e in dataset.train) == Counter(flower_classes())
    assert all(check_image(dataset.image(e), "") for e in chosen)
    assert load(root, test=151, on_bad_image="skip").splits == dataset.splits


def test_without_bad_images_skipping_changes_nothing(root):
    assert load(root, on_bad_image="skip") == load(root)


def test_copies_are_left_out_wherever_they_lie(root):
    # Images 1, 103, 205 and 307 are the 4 of class 1.
    own = {f"jpg/image_{number:05d}.jpg" for number in (1, 103, 205, 307)}
    kept, copy = (next(iter(own & official(root, split))) for split in ("trnid", "tstid"))
    (root / copy).write_bytes((root / kept).read_bytes())
    dataset = load(root, shots=2, test=152)
    assert dataset.copies == {copy: kept} and kept in [e.example_id for e in dataset.train]
    assert copy not in [e.example_id for e in dataset.test]
    assert "153 images, but 152 are left" in refusal(root, shots=2, test=153)


def test_the_images_of_a_manifest_are_taken_from_any_official_split(root, tmp_path):
    """Manifests may be older than the use of the official splits."""
    now = load(root)
    then = replace(now, train=now.test[:102], test=now.train[:30])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(then, 0)))
    assert load(root, manifest=tmp_path / "manifest.json").splits == then.splits


def test_only_files_of_equal_size_are_read_to_find_copies(root, monkeypatch):
    for number, size in ((1, 5000), (2, 5000), (3, 6000)):
        (root / f"jpg/image_{number:05d}.jpg").write_bytes(bytes([number]) * size)
    read = []
    digest = archive.file_sha256
    monkeypatch.setattr(archive, "file_sha256", lambda path: read.append(path.name) or digest(path))
    digests = open_archive(root, "data.path", MAX_BYTES).digests
    assert "image_00001.jpg" in read and "image_00002.jpg" in read and "image_00003.jpg" not in read
    assert digests[2] == "6000"
    assert digests[0] != digests[1] and digests[0].startswith("5000 ")


def test_one_picture_with_two_labels_is_refused(root):
    (root / "jpg/image_00002.jpg").write_bytes((root / "jpg/image_00001.jpg").read_bytes())
    assert "the same picture has two labels" in refusal(root)


def test_a_missing_path_says_what_belongs_there(tmp_path):
    (tmp_path / "file").touch()
    assert "data.path is missing" in refusal(None)
    assert "does not exist; it must hold jpg/" in refusal(tmp_path / "nowhere")
    assert "is not a folder" in refusal(tmp_path / "file")
    assert "has no imagelabels.mat; get it from https" in refusal(tmp_path)


def test_missing_images_are_listed_and_the_list_is_cut(root):
    for number in range(1, 46):
        (root / f"jpg/image_{number:05d}.jpg").unlink()
    lines = refusal(root).splitlines()
    assert "45 of the 408 images" in lines[0] and "unpack 102flowers.tgz" in lines[0]
    assert lines[1] == "  jpg/image_00001.jpg: missing"
    assert len(lines) == 1 + 40 + 1 and lines[-1] == "  and 5 more"


def test_images_stay_in_the_folder(root, tmp_path):
    first, second, third = (root / f"jpg/image_{number:05d}.jpg" for number in (1, 2, 3))
    first.rename(tmp_path / "outside.jpg")
    first.symlink_to(tmp_path / "outside.jpg")
    second.unlink()
    os.mkfifo(second)
    third.rename(root / "inside.jpg")
    third.symlink_to(root / "inside.jpg")
    assert refusal(root).splitlines()[1:] == [
        "  jpg/image_00001.jpg: a link out of the folder",
        "  jpg/image_00002.jpg: missing",
    ]


@pytest.mark.parametrize("label", [0, 103, -1])
def test_labels_out_of_range_are_listed(root, label):
    labels = np.arange(408, dtype=np.int16)[None] % CLASSES + 1
    labels[0, 6] = label
    save_labels(root, labels)
    message = refusal(root)
    assert "labels outside 1 to 102" in message and message.endswith(f"\n  image 7: label {label}")


@pytest.mark.parametrize("labels", [[[1.5, 2.0]], [["rose"]], [[np.nan]], np.array([[{"a": 1}]], dtype=object)])
def test_labels_that_are_no_whole_numbers_are_refused(root, labels):
    save_labels(root, labels)
    assert "must hold whole numbers" in refusal(root)


def test_splits_must_name_every_image_once(root):
    savemat(root / "setid.mat", {"trnid": [[1, 2]], "valid": [[2]], "tstid": [[3]]})
    assert "each of the 408 images of imagelabels.mat once: they name 4, 3 of them different" in refusal(root)
    savemat(root / "setid.mat", {"trnid": [[1, 2]], "valid": [[2]]})
    assert "no variable 'tstid'" in refusal(root)


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(200), b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x02IM" + b"\xff" * 64]
)
def test_a_file_that_is_no_mat_file_is_refused(root, content):
    (root / "imagelabels.mat").write_bytes(content)
    assert "imagelabels.mat" in refusal(root)


def test_every_cut_of_a_mat_file_is_explained(root):
    whole = (root / "imagelabels.mat").read_bytes()
    for length in range(0, len(whole), 11):
        (root / "imagelabels.mat").write_bytes(whole[:length])
        assert "imagelabels.mat" in refusal(root)


def test_changed_bytes_in_a_mat_file_are_explained_or_do_no_harm(root):
    whole = (root / "imagelabels.mat").read_bytes()
    for position in range(0, len(whole), 9):
        changed = bytearray(whole)
        changed[position] ^= 0xFF
        (root / "imagelabels.mat").write_bytes(changed)
        with contextlib.suppress(UserError):
            open_archive(root, "data.path", MAX_BYTES)


def test_the_order_of_the_classes_can_be_given(root):
    backwards = flower_classes()[::-1]
    assert load(root, classes=backwards).classes == backwards
    assert "'tulip' is in data.classes but has no images" in refusal(root, classes=[*backwards, "tulip"])


def test_a_hub_setting_is_refused_here(root):
    with pytest.raises(ValueError, match="held_out is for source huggingface only, source is flower102"):
        DataSection(source="flower102", path=root, held_out=root)
