"""Choices of which images go where: folds, conflicts, near-copies, numbers that fit."""

import io

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import FewShotDataset, few_shot_split, load_dataset
from rft_cluster.data.conflicts import near_copies, near_copies_note
from rft_cluster.data.dataset import LabelledImage
from tests.unit.data.test_data import examples
from tests.unit.data.test_layouts import fill


def section(**values) -> DataSection:
    return DataSection(**{"source": "folder", "shots": 2, "validation": 3, "test": 4, **values})


def split(counts: dict[str, int], seed: int = 0, **values) -> FewShotDataset:
    return few_shot_split("toy", examples(counts), list(counts), section(**values), seed)


# --- folds


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("folds", [2, 3, 5, 10])
@pytest.mark.parametrize("sizes", [(12, 12), (5, 9, 30), (11, 4, 7, 6)])
def test_every_image_is_tested_once_and_never_seen_by_its_fold(seed, folds, sizes):
    counts = dict(zip("abcd", sizes, strict=False))
    parts = [split(counts, seed, folds=folds, fold=fold) for fold in range(1, folds + 1)]
    tested = [e.example_id for part in parts for e in part.test]
    assert sorted(tested) == sorted(e.example_id for e in examples(counts))
    assert max(len(part.test) for part in parts) - min(len(part.test) for part in parts) <= 1
    for part in parts:
        held_out = {part.image(e) for e in (*part.test, *part.validation)}
        assert not held_out & set(part.pool) and not held_out & {part.image(e) for e in part.train}
        assert [sum(e.label == label for e in part.train) for label in counts] == [2] * len(counts)
        assert len(part.validation) == 3


def test_validation_takes_what_is_left_of_a_fold():
    part = split({"a": 6, "b": 6}, folds=3, fold=1, validation=200, test=500)
    assert [len(one) for one in part.splits.values()] == [4, 4, 4]


def test_folds_that_leave_too_few_to_train_on_say_what_fits():
    with pytest.raises(UserError, match=r"outside the test images of fold 1 .*data.shots=2:\n  'a': 2\n  'b': 2$"):
        split({"a": 4, "b": 4}, folds=2, fold=1, shots=3)
    assert len(split({"a": 4, "b": 4}, folds=2, fold=1, shots=2).train) == 4


def test_folds_and_a_test_split_of_its_own_do_not_go_together(tmp_path):
    for number, name in enumerate(("train", "test")):
        fill(tmp_path / name, 100 * number)
    with pytest.raises(UserError, match=r"has test images of its own: leave data.folds out"):
        load_dataset(section(path=tmp_path, folds=3, fold=1), 0)


@pytest.mark.parametrize("sizes", [(3, 3), (6, 9), (12, 40), (4, 5, 6), (100, 7)])
@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize(("validation", "test"), [(200, 500), (0, 500), (200, 0), (30, 1)])
def test_every_cure_for_too_few_images_works(sizes, shots, validation, test):
    counts = dict(zip("abc", sizes, strict=False))
    values = {"shots": shots, "validation": validation, "test": test}
    if validation + test <= sum(sizes) - shots * len(sizes):
        return
    with pytest.raises(UserError) as caught:
        split(counts, **values)
    cures = str(caught.value).splitlines()[1:]
    assert cures[0] == "  add images" and len(cures) > 1
    for cure in cures[1:]:
        keys = dict(word.removeprefix("data.").split("=") for word in cure.split() if word.startswith("data."))
        for fold in range(1, int(keys["folds"]) + 1) if "folds" in keys else [0]:
            numbers = {key: int(value) for key, value in keys.items()}
            part = split(counts, **(values | numbers | {"fold": fold}))
            assert part.train and (part.test or not test)


# --- conflicts


def test_conflicts_are_all_listed_and_can_be_left_out():
    several = examples({"a": 90})
    others = [LabelledImage(f"b/{i}", e.image, "b") for i, e in enumerate(examples({"b": 97})[90:])]
    wrong = [LabelledImage(f"b/wrong{i}", several[i].image, "b") for i in range(60)]
    for many in (several + others + wrong, wrong + others + several):
        with pytest.raises(UserError) as caught:
            few_shot_split("toy", many, ["a", "b"], section(), 0)
        first, *lines = str(caught.value).splitlines()
        assert "the same picture has two labels, 60 times" in first and "data.on_conflict=skip" in first
        assert len(lines) == 60
        dataset = few_shot_split("toy", many, ["a", "b"], section(on_conflict="skip"), 0)
        assert set(dataset.skipped) == {e.example_id for e in (*wrong, *several[:60])}
        assert all(f"whose label is {'ab'[i.startswith('a')]!r}" in why for i, why in dataset.skipped.items())


# --- near-copies


def encoded(picture: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


PHOTOS = [Image.fromarray(image) for image in load_sample_images().images]
WAYS = {
    "jpeg 40": lambda p: encoded(p, quality=40),
    "png": lambda p: encoded(p, "PNG"),
    "webp": lambda p: encoded(p, "WEBP", quality=60),
    "half": lambda p: encoded(p.resize((p.width // 2, p.height // 2))),
    "224": lambda p: encoded(p.resize((224, 224))),
    "thumbnail": lambda p: encoded(p.resize((63, 63)), quality=60),
    "a pixel less": lambda p: encoded(p.resize((p.width - 1, p.height - 1))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sides", [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_a_picture_on_both_sides_of_a_split_is_noted(way, sides):
    parts: dict[str, list[LabelledImage]] = {"train": [], "validation": [], "test": []}
    parts[sides[0]] = [
        LabelledImage("one", encoded(PHOTOS[0], quality=95), "x"),
        LabelledImage("two", encoded(PHOTOS[1]), "y"),
    ]
    mirrored = PHOTOS[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    parts[sides[1]] = [LabelledImage("copy", WAYS[way](PHOTOS[0]), "x"), LabelledImage("other", encoded(mirrored), "y")]
    dataset = FewShotDataset.of("toy", ["x", "y"], *parts.values(), [])
    assert near_copies(dataset) == [(f"{sides[0]}: one", f"{sides[1]}: copy")]
    (note,) = near_copies_note(dataset)
    assert (
        note.startswith("1 image of one split look the same") and f"{sides[0]}: one looks like {sides[1]}: copy" in note
    )


def test_pictures_of_one_colour_and_different_ones_are_not_noted(tmp_path):
    flat = [LabelledImage(str(i), encoded(Image.new("RGB", (32, 32), (i, i, i)), "PNG"), "x") for i in range(4)]
    assert near_copies(FewShotDataset.of("flat", ["x", "y"], flat[:2], [], flat[2:], [])) == []
    assert load_dataset(DataSection(source="digits"), 0).notes() == []


def test_a_folder_says_so(tmp_path):
    fill(tmp_path)
    for path in [*tmp_path.glob("*/*.png")]:
        picture = Image.open(path).resize((23, 23), Image.Resampling.BICUBIC)
        picture.save(path.with_name(f"small{path.name}"))
    (note,) = load_dataset(section(path=tmp_path, validation=6, test=12), 0).notes()
    assert "images of one split look the same as one of another" in note and "small" in note
