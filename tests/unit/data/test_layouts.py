"""Folders as people have them: names of splits, levels more, files of other kinds, systems' folders."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import FewShotDataset, load_dataset
from rft_cluster.data.files import SUFFIXES, SYSTEM_FOLDERS, LeftOut
from rft_cluster.data.names import find_splits, split_role, stripped_names
from rft_cluster.predict import image_files

FORMAT = {
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
FORMAT |= dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM") | dict.fromkeys((".png", ".apng"), "PNG")
CLASSES = ("rose", "tulip")
AS_WRITTEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".ipynb_checkpoints", ".Trash-1000")


def put(path: Path, number: int, side: int = 24) -> Path:
    """A picture of its own for each number, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    mode = {".pgm": "L", ".pbm": "1"}.get(path.suffix.lower(), "RGB")
    picture = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC).convert(mode)
    picture.save(path, FORMAT.get(path.suffix.lower(), "JPEG"))
    return path


def fill(root: Path, start: int = 0, count: int = 6, classes=CLASSES, suffix: str = ".png") -> Path:
    for i, label in enumerate(label for label in classes for _ in range(count)):
        put(root / label / f"{i:03d}{suffix}", start + i)
    return root


def load(root: Path, **values) -> FewShotDataset:
    return load_dataset(
        DataSection(**{"source": "folder", "path": root, "shots": 1, "validation": 2, "test": 4, **values}), 0
    )


def refusal(root: Path, **values) -> str:
    with pytest.raises(UserError) as caught:
        load(root, **values)
    return str(caught.value)


def tops(dataset: FewShotDataset, split: str) -> set[str]:
    """The first folders of a split's images."""
    return {e.example_id.split("/")[0] for e in dataset.splits[split]}


# --- splits

WORDS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
CASES = (str.lower, str.upper, str.title)
ENDINGS = ("", "_set", " images", "-data", "set")


def test_every_spelling_of_a_split_is_known():
    for role, words in WORDS.items():
        for word, case, ending in itertools.product(words, CASES, ENDINGS):
            assert split_role(case(word + ending)) == role
    for other in ("rose", "trainer", "tests of wood", "valley", "contest", "images", "data", "set", ""):
        assert split_role(other) is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("train", WORDS["train"])
@pytest.mark.parametrize("validation", WORDS["validation"])
@pytest.mark.parametrize("test", ["", "test"])
def test_images_set_apart_serve_their_split(tmp_path, case, train, validation, test):
    names = {role: case(word) for role, word in (("train", train), ("validation", validation), ("test", test)) if word}
    for number, name in enumerate(names.values()):
        fill(tmp_path / name, 100 * number)
    dataset = load(tmp_path)
    assert tops(dataset, "train") == {names["train"]}
    assert tops(dataset, "validation") == {names["validation"]}
    assert tops(dataset, "test") == {names.get("test", names["validation"])}
    assert [len(split) for split in dataset.splits.values()] == [2, 2, 4] and dataset.notes() == []
    assert len(dataset.pool) == 12


def test_two_folders_of_one_split_are_refused_and_can_be_told_apart(tmp_path):
    for number, name in enumerate(("train", "val", "valid")):
        fill(tmp_path / name, 100 * number)
    message = refusal(tmp_path)
    assert "val and valid, which both mean the split validation" in message
    dataset = load(tmp_path, splits={"train": "train", "validation": "val", "test": "valid"})
    assert (tops(dataset, "validation"), tops(dataset, "test")) == ({"val"}, {"valid"})
    assert "data.splits: " in refusal(tmp_path, splits={"train": "nope"})


def test_copies_and_conflicts_are_found_across_all_splits(tmp_path):
    for number, name in enumerate(("train", "val", "test")):
        fill(tmp_path / name, 100 * number)
    copied = shutil.copy(tmp_path / "train/rose/000.png", tmp_path / "val/rose/copy.png")
    shutil.copy(tmp_path / "val/rose/001.png", tmp_path / "test/rose/copy.png")
    dataset = load(tmp_path, validation=12, test=12)
    assert dataset.copies == {"val/rose/copy.png": "train/rose/000.png", "test/rose/copy.png": "val/rose/001.png"}
    shutil.move(copied, tmp_path / "val/tulip/copy.png")
    assert "train/rose/000.png ('rose') and val/tulip/copy.png ('tulip')" in refusal(tmp_path)
    skipped = load(tmp_path, on_conflict="skip").skipped
    assert sorted(skipped) == ["train/rose/000.png", "val/tulip/copy.png"]


def test_names_that_mean_no_split_are_left_alone():
    assert find_splits(["images", "rose"], {}, "x") == {}


# --- levels


@pytest.mark.parametrize("wrapped", ["", "flowers", "flowers/flowers"])
@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("inner", ["", "images"])
@pytest.mark.parametrize("system", ["", "__MACOSX"])
def test_a_level_more_is_looked_through(tmp_path, wrapped, splits, inner, system):
    for number, part in enumerate(("train", "test") if splits else ("",)):
        for label in CLASSES:
            for i in range(8):
                put(tmp_path / wrapped / part / label / inner / f"{label}{i}.png", 100 * number + 10 * len(label) + i)
    if system:
        put(tmp_path / system / "._a.png", 1)
    dataset = load(tmp_path)
    assert dataset.classes == list(CLASSES) and len(dataset.pool) == (16 if splits else 10)
    notes = [f"the classes lie in {tmp_path / wrapped}, the one folder of data.path"] if wrapped else []
    assert dataset.notes() == notes + ([f"ignored system folders: {system}/"] if system else [])


def test_the_path_in_the_message_works(tmp_path):
    fill(tmp_path / "set a/train", 0)
    fill(tmp_path / "set b/deep", 100)
    message = refusal(tmp_path)
    path = message.split("set data.path=")[1].split(", or")[0]
    assert load(Path(path)).classes == list(CLASSES)


def test_images_without_class_folders_have_no_labels(tmp_path):
    fill(tmp_path / "train")
    for i in range(5):
        put(tmp_path / "test" / f"{i}.png", 900 + i)
    dataset = load(tmp_path)
    assert tops(dataset, "test") == {"train"}
    assert (
        dataset.notes()
        == [
            "test/ has no class folders, so its images have no labels: they are left out",
            "left out 5 files: 5 in test/ (test/0.png)",
        ]
        or "left out 5 files: 5 in test/" in dataset.notes()[1]
    )


# --- files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_every_usual_suffix_is_read(tmp_path, suffix, case):
    fill(tmp_path, suffix=case(suffix), count=5)
    dataset = load(tmp_path)
    assert dataset.notes() == [] or ".pbm" in suffix  # few pictures of one bit differ
    assert {Path(e.example_id).suffix for e in dataset.train} == {case(suffix)}
    assert len(list(image_files([tmp_path], LeftOut()))) == 10


def test_what_is_left_out_is_counted_by_kind_for_training_and_predict(tmp_path):
    fill(tmp_path)
    random = np.random.default_rng(0)
    kinds = {kind: int(random.integers(1, 30)) for kind in (".CR2", ".dcm", ".txt", "", ".xyz", ".mp4")}
    for kind, count in kinds.items():
        for i in range(count):
            (tmp_path / "rose" / f"x{i}{kind}").write_text("x")
    (tmp_path / "tulip" / "y.cr2").write_text("x")  # one kind with .CR2
    kinds[".CR2"] += 1
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._000.png"):
        (tmp_path / "rose" / name).write_text("x")
    counts = [f"{count} {kind or 'without a suffix'}" for kind, count in kinds.items()]
    left_out = LeftOut()
    assert len(list(image_files([tmp_path], left_out))) == 12
    for (note,) in (load(tmp_path).notes(), left_out.notes()):
        assert note.startswith(f"left out {sum(kinds.values())} files: ")
        found = note.split(": ")[1].split("), ")
        assert all(any(entry.casefold().startswith(f"{count} (".casefold()) for entry in found) for count in counts)


def test_sub_folders_and_pictures_beside_the_classes_are_counted(tmp_path):
    fill(tmp_path)
    for i in range(20):
        put(tmp_path / "rose/2019" / f"{i}.jpg", 500 + i)
    put(tmp_path / "lonely.jpg", 900)
    put(tmp_path / "rose/.hidden.jpg", 901)
    (note,) = load(tmp_path).notes()
    assert note.startswith("left out 22 files: 20 in sub-folders of rose/ (2019/")
    assert f"1 beside the folders of {tmp_path.name}/ (lonely.jpg)" in note and "1 hidden (.hidden.jpg)" in note


@pytest.mark.parametrize("name", sorted({*SYSTEM_FOLDERS, *AS_WRITTEN}))
@pytest.mark.parametrize("where", ["", "rose"])
def test_folders_of_systems_are_passed_over(tmp_path, name, where):
    root = fill(tmp_path / "photos")
    put(root / where / name / "x/a.jpg", 77)
    assert load(root).notes() == [f"ignored system folders: {name}/"]
    left_out = LeftOut()
    assert len(list(image_files([root], left_out))) == 12 and left_out.notes() == load(root).notes()


def test_a_table_among_pictures_is_pointed_to(tmp_path):
    put(tmp_path / "images/1.jpg", 1)
    for name in ("sample_submission.csv", "a.csv", "train.csv"):  # of several the likeliest
        (tmp_path / name).write_text("image,label\n1.jpg,rose\n")
    assert refusal(tmp_path).endswith(f"data.source=csv data.path={tmp_path}/train.csv")


def test_flat_folders_of_splits_are_no_classes_where_a_table_has_the_labels(tmp_path):
    for number, name in enumerate(("train", "test")):
        for i in range(6):
            put(tmp_path / name / f"{i}.jpg", 20 * number + i)
    assert load(tmp_path).classes == ["test", "train"]  # they may well be classes
    (tmp_path / "train.csv").write_text("image,label\n0.jpg,rose\n")
    message = refusal(tmp_path)
    assert "no class folders in them" in message and f"data.source=csv data.path={tmp_path}/train.csv" in message


# --- classes


def test_some_of_the_classes(tmp_path):
    fill(tmp_path, classes=("rose", "tulip", "lily"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "lily/bad.jpg").write_text("x")
    dataset = load(tmp_path, only=["rose", "tulip"], aliases={"lily": ["lilium"], "rose": ["rosa"]})
    assert dataset.classes == ["rose", "tulip"] and len(dataset.pool) == 12 - 6
    (note,) = dataset.notes()
    assert note.startswith("2 of 4 classes are used (data.only") and note.endswith("images of the others are left out")
    assert load(tmp_path, only=["rose", "tulip"], classes=["tulip", "rose"]).classes == ["tulip", "rose"]
    assert "data.only: 'tulp' is none of the classes; did you mean 'tulip'?" in refusal(tmp_path, only=["rose", "tulp"])
    digits = load_dataset(DataSection(source="digits", only=["one", "two"], validation=20, test=50), 0)
    assert digits.classes == ["one", "two"] and {e.label for e in digits.test} == {"one", "two"}


@pytest.mark.parametrize("form", ["{:03d}.{}", "n020856{:02d}-{}", "{}_{}", "{:02d} {}", "c{} - {}", "{}. {}"])
def test_numbers_before_names_are_noted_and_can_go(tmp_path, form):
    names = ["Black_footed_Albatross", "Chihuahua"]
    fill(tmp_path, classes=[form.format(i, name) for i, name in enumerate(names)])
    (note,) = load(tmp_path).notes()
    assert "data.strip_prefix=true" in note and repr(names[0]) in note
    dataset = load(tmp_path, strip_prefix=True)
    assert dataset.classes == names and dataset.notes() == [] and {e.label for e in dataset.test} == set(names)
    assert load(tmp_path, strip_prefix=True, only=names).classes == names


@pytest.mark.parametrize(
    "names", [("1.5 mm", "15 mm"), ("15 mm", "25 mm"), ("1", "2"), ("001.rose", "tulip"), ("01.a", "01.b")]
)
def test_other_numbers_are_part_of_the_name(tmp_path, names):
    assert stripped_names(names) is None
    fill(tmp_path, classes=names)
    assert load(tmp_path).notes() == []
    assert "data.strip_prefix is set, but" in refusal(tmp_path, strip_prefix=True)


@pytest.mark.parametrize("number", ["1-", "01_", "2. ", "003 - "])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("role", WORDS)
def test_splits_may_be_numbered(role, case, number):
    assert all(split_role(number + case(word)) == role for word in WORDS[role])
    assert split_role(f"{number}rose") is None


@pytest.mark.parametrize("names", [("images", "labels"), ("imgs", "annotations", "notes"), ("a", "b")])
@pytest.mark.parametrize("splits", [("train", "val"), ("Train", "Valid", "Test"), ("1-train", "2-test"), ()])
def test_the_path_that_is_named_holds_all_that_lies_there(tmp_path, names, splits):
    for number, split in enumerate(splits or (".",)):
        fill(tmp_path / names[0] / split, start=100 * number)
    for name in names[1:]:  # texts, as of object detectors
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train" / "000.txt").write_text("0 0.5 0.5 1 1")
    message = refusal(tmp_path)
    dataset = load(Path(message.split("set data.path=")[1].split(", or")[0].split(";")[0]))
    assert tops(dataset, "train") == ({splits[0]} if splits else set(CLASSES))
    assert len({tops(dataset, split).pop() for split in ("train", "validation", "test") if splits}) == len(splits)


@pytest.mark.parametrize("flat", [0, 1, 2])
@pytest.mark.parametrize("below", [("jan", "feb"), ("train", "extra"), ("a", "b", "c")])
def test_classes_with_folders_in_them_are_told_to_be_emptied_into_them(tmp_path, flat, below):
    classes = ("daisy", "rose", "tulip")
    for number, label in enumerate(classes):
        if number < flat:
            fill(tmp_path, start=1000 * number, classes=(label,))
        else:
            fill(tmp_path / label, start=1000 * number, classes=below)
    message = refusal(tmp_path)
    assert ("sub-folders do: move their images up" if flat else "move the images in their sub-folders up") in message
    for label in classes[flat:]:
        for picture in list((tmp_path / label).rglob("*.png")):
            picture.rename(tmp_path / label / f"{picture.parent.name}-{picture.name}")
        for name in below:
            (tmp_path / label / name).rmdir()
    assert load(tmp_path).classes == list(classes)


def test_a_class_s_own_folder_is_told_from_that_of_the_classes(tmp_path):
    fill(tmp_path / "photos")
    message = refusal(tmp_path / "photos" / "rose")
    assert load(Path(message.split("set data.path=")[1].split(" where")[0])).classes == list(CLASSES)
