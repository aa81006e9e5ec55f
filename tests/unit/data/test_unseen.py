"""Classes that are tested and not trained."""

import json

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection, load_config
from rft_cluster.data import load_dataset, manifest
from rft_cluster.data.manifest import read_manifest, unseen_in
from rft_cluster.prompts import draw_prompts
from rft_cluster.run.task import question


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
