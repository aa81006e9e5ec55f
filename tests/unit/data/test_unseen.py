"""Classes that are tested and not trained."""

import json
from collections import Counter

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import AlsoSection, DataSection, load_config
from rft_cluster.data import FewShotDataset, few_shot_split, load_dataset, manifest
from rft_cluster.data.manifest import read_manifest, unseen_in
from rft_cluster.prompts import draw_prompts
from rft_cluster.run.task import question
from tests.unit.data.test_data import examples
from tests.unit.data.test_layouts import fill, load, put, refusal


def digits(**keys):
    return load_dataset(DataSection(source="digits", **{"shots": 2, "validation": 20, "test": 40, **keys}), 3)


WHOLE, PART = digits(), digits(unseen_classes=["nine", "four"])


def test_unseen_classes_are_tested_and_neither_trained_nor_validated():
    assert PART.unseen == ("four", "nine") and WHOLE.unseen == ()
    assert PART.classes == WHOLE.classes and PART.test == WHOLE.test and list(PART.pool) == list(WHOLE.pool)
    for split in ("train", "validation"):
        kept = [one for one in WHOLE.splits[split] if one.label not in PART.unseen]
        assert PART.splits[split] == kept and len(kept) == 0.8 * len(WHOLE.splits[split])
    assert [one for one in PART.test if one.label not in PART.unseen] == PART.seen_test != PART.test
    assert WHOLE.seen_test == WHOLE.test
    (note,) = PART.notes()
    assert note.startswith("2 of 10 classes are tested and not trained ('four', 'nine'): 4 of their images")


def test_a_manifest_keeps_them(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(manifest(PART, 3)))
    again = digits(manifest=file, unseen_classes=["nine", "four"])
    assert again.splits == PART.splits and unseen_in(read_manifest(file)) == PART.unseen
    # The small model learns to see from the pool: a run that goes on has to have the same.
    assert list(again.pool) == list(PART.pool) and again.left_out == PART.left_out and len(PART.left_out) == 4
    assert manifest(again, 3) == manifest(PART, 3)
    file.write_text(json.dumps(manifest(WHOLE, 3)))  # of a run that was trained on all: the same images are compared
    assert digits(manifest=file, unseen_classes=["nine", "four"]).splits == PART.splits


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nin"], "data.unseen_classes: 'nin' is none of the classes; did you mean 'nine'?"),
        (["rose"], "'rose' is none of the classes; there are 'zero', 'one'"),
        (["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"], "names 9 of 10 classes.*name 8 at"),
    ],
)
def test_wrong_ones_are_refused(names, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        digits(unseen_classes=names)


def test_a_class_without_a_test_image_says_nothing():
    with pytest.raises(UserError, match=r"the test has no images of these classes(?s:.*)'(one|two|three)'"):
        digits(test=2, unseen_classes=["one", "two", "three"])


# --- classes without training images, or with too few


@pytest.fixture
def apart(tmp_path):
    """train/{rose,tulip} and test/{rose,tulip,lily}, of 6 images each."""
    fill(tmp_path / "train")
    return fill(tmp_path / "test", 100, classes=("rose", "tulip", "lily")).parent


def test_a_class_of_the_test_folder_alone_is_tested_and_never_trained(apart):
    said = "rename them as there, or remove them, or name them in data.unseen_classes to test them without training"
    assert said in refusal(apart) and "'lily'" in refusal(apart)
    dataset = load(apart, unseen_classes=["lily"], validation=0, test=6)
    assert dataset.classes == ["rose", "tulip", "lily"] and dataset.unseen == ("lily",)
    assert {one.label for one in dataset.train} == {"rose", "tulip"}
    assert Counter(one.label for one in dataset.test) == {"rose": 2, "tulip": 2, "lily": 2}
    asked = question(load_config("digits", ["prompt.template=closed"]), dataset)
    assert "lily" in asked.text
    assert not any("lily" in prompt.text for prompt in draw_prompts(dataset.train, asked, "train", 0, 3))


@pytest.mark.parametrize("key", ["only", "classes"])
def test_other_keys_may_name_a_class_of_the_test_folder_alone(apart, key):
    named = {key: ["lily", "rose", "tulip"]}
    dataset = load(apart, unseen_classes=["lily"], validation=0, test=6, **named)
    assert dataset.unseen == ("lily",) and Counter(one.label for one in dataset.test)["lily"] == 2


def test_a_manifest_keeps_a_class_without_training_images(apart, tmp_path):
    file = tmp_path / "manifest.json"
    for root, keys in ((apart, {"test": 6}), (fill(fill(tmp_path / "flat"), 300, 1, ["lily"]), {"shots": 2})):
        keys |= {"unseen_classes": ["lily"], "validation": 0}
        before = load(root, **keys)
        file.write_text(json.dumps(manifest(before, 0)))
        again = load(root, manifest=file, **keys)
        assert again.splits == before.splits and manifest(again, 0) == manifest(before, 0)


def test_its_name_may_have_a_prefix_and_other_classes_of_the_test_alone_are_still_refused(tmp_path):
    fill(tmp_path / "train", classes=("1_rose", "2_tulip"))
    fill(tmp_path / "test", 100, classes=("1_rose", "2_tulip", "3_lily"))
    stripped = {"strip_prefix": True, "validation": 0, "test": 6}
    assert load(tmp_path, unseen_classes=["lily"], **stripped).unseen == ("lily",)
    fill(tmp_path / "test", 200, classes=("4_daisy",))
    assert refusal(tmp_path, unseen_classes=["lily"], **stripped).splitlines()[1:] == ["  '4_daisy'"]


def test_it_may_be_in_a_table_s_test_rows_alone(tmp_path):
    rows = []
    for number in range(18):
        label, role = ("rose", "tulip", "lily")[number % 3], "test" if number % 3 == 2 or number > 8 else "train"
        rows.append(f"{put(tmp_path / f'{number}.png', number).name},{label},{role}")
    (tmp_path / "table.csv").write_text("\n".join(["image,label,split", *rows]))
    dataset = load(tmp_path, source="csv", unseen_classes=["lily"], validation=0, test=6)
    assert dataset.unseen == ("lily",) and len(dataset.test) == 6


def flat(counts, **keys):
    values = {"source": "folder", "shots": 4, "validation": 3, "test": 6, **keys}
    return few_shot_split("toy", examples(counts), list(counts), DataSection(**values), 0)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_one_with_fewer_images_than_shots_is_tested_with_all_of_them_beside_the_others_own(images):
    counts = {"rose": 12, "tulip": 12}
    with pytest.raises(UserError, match=r"data\.shots is 4, but these classes have fewer"):
        flat({**counts, "lily": images})
    dataset, without = flat({**counts, "lily": images}, unseen_classes=["lily"]), flat(counts)
    assert (dataset.train, dataset.validation) == (without.train, without.validation)
    assert dataset.test[:6] == without.test and {one.label for one in dataset.test[6:]} == {"lily"}
    assert len(dataset.test) == 6 + images and len(dataset.pool) == len(without.pool)


def test_the_other_classes_still_need_their_shots_and_cures_are_for_them_alone():
    with pytest.raises(UserError, match=r"set data.shots=3:\n  'tulip': 3$"):
        flat({"rose": 12, "tulip": 3, "lily": 1}, unseen_classes=["lily"])
    with pytest.raises(UserError, match=r"9 images, but 8 are left after 4 shots of each of 2 classes") as caught:
        flat({"rose": 12, "tulip": 4, "lily": 1}, unseen_classes=["lily"])
    assert "data.folds" not in str(caught.value)


@pytest.mark.parametrize("images", [4, 5, 12])
def test_one_with_enough_images_for_the_shots_is_drawn_as_without_the_key(images):
    counts = {"rose": 12, "tulip": 12, "lily": images}
    assert flat(counts, unseen_classes=["lily"]).splits == flat(counts).splits


# --- nothing but unseen classes in the test


def test_a_test_of_unseen_classes_alone_is_refused_with_what_to_add(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", 100, classes=("lily",))
    said = (
        "data.test: all 4 test images are of classes that are not trained ('lily'), but the baselines and the verdict"
    )
    message = refusal(tmp_path, unseen_classes=["lily"], validation=0)
    assert message.startswith(said) and "the others ('rose', 'tulip'): add test images of one of these" in message
    fill(tmp_path / "test", 200, classes=("tulip",))  # the cure
    assert load(tmp_path, unseen_classes=["lily"], validation=0).seen_test
    both = sorted({one.label for one in digits(test=2).test})
    with pytest.raises(UserError, match=r"all 2 test images .* or raise data.test"):
        digits(test=2, unseen_classes=both)
    assert digits(test=40, unseen_classes=both).seen_test


def only_one(config: DataSection, seed: int) -> FewShotDataset:
    """Of a user's own: roses to learn from, tulips for the test."""
    roses, tulips = (examples({label: 3}) for label in ("rose", "tulip"))
    return FewShotDataset.of("own", ["rose", "tulip"], roses, [], tulips, [])


def test_one_s_own_source_is_refused_likewise_but_not_as_data_that_are_only_tested():
    own = {"source": f"{__name__}:only_one"}
    with pytest.raises(UserError, match=r"all 3 test images are of classes that are not trained \('tulip'\)"):
        load_dataset(DataSection(**own), 0)
    assert len(load_dataset(AlsoSection(**own), 0).test) == 3


@pytest.mark.parametrize("override", ["data.folds=5", "data.test=0"])
def test_they_need_a_test_of_their_own(override):
    with pytest.raises(UserError, match="unseen_classes"):
        load_config("digits", ["data.unseen_classes=[nine]", override])


def test_training_prompts_never_list_them_and_those_of_the_test_do():
    asked = question(load_config("digits", ["prompt.template=closed"]), PART)
    texts = [prompt.text for prompt in draw_prompts(PART.train, asked, "train", 0, 3)]
    assert not any("nine" in text or "four" in text for text in texts) and all("eight" in text for text in texts)
    assert len(set(texts)) > 10  # in other orders
    assert all(label in text for label in PART.classes for text in asked.in_some_orders(3, 0))
