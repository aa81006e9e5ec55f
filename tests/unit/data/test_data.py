import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection, load_config
from rft_cluster.data import load_dataset
from rft_cluster.data.dataset import NO_CLASS, UNSURE, FewShotDataset, LabelledImage, check_labels, check_names
from rft_cluster.data.images import FORMATS, MAX_BYTES, check_image, open_image
from rft_cluster.data.manifest import manifest
from rft_cluster.data.split import few_shot_split


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def picture(number: int) -> bytes:
    """A 2x2 picture of its own for each number."""
    return encoded(Image.new("RGB", (2, 2), (number // 256, number % 256, 7)))


def examples(counts: dict[str, int]) -> list[LabelledImage]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [LabelledImage(f"{label}/{i}", picture(i), label) for i, label in enumerate(labels)]


def section(**values) -> DataSection:
    return DataSection(**{"source": "folder", "shots": 1, "validation": 1, "test": 2, **values})


def split(counts: dict[str, int], seed: int = 0, **values) -> FewShotDataset:
    return few_shot_split("toy", examples(counts), list(counts), section(**values), seed)


def per_class(chosen: list[LabelledImage], classes: str | list[str] = "abc") -> list[int]:
    return [sum(e.label == label for e in chosen) for label in classes]


def ids(chosen: list[LabelledImage]) -> list[str]:
    return [e.example_id for e in chosen]


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    for i, example in enumerate(examples(counts)):
        (root / example.label).mkdir(parents=True, exist_ok=True)
        (root / example.label / f"{i:03d}.png").write_bytes(example.image)
    return root


# --- choosing the splits


def test_each_class_is_shared_evenly():
    # 30 images, 2 shots each: 6 train. 12 held out are 4 of each class, 8 of the 12 for test.
    # In even steps of 2/3 over 4+4+4 they make 2, 3, 3 for test and 2, 1, 1 for validation.
    dataset = split({"a": 10, "b": 10, "c": 10}, shots=2, validation=4, test=8)
    assert per_class(dataset.train) == [2, 2, 2]
    assert per_class(dataset.test) == [2, 3, 3]
    assert per_class(dataset.validation) == [2, 1, 1]
    assert len(dataset.pool) == 30 - 12


def test_a_short_class_gives_all_it_has_to_the_held_out_images():
    # After 1 shot: a has 1, b and c have 9. Turns: a b c, b c, b c, b c = 9 images: 1, 4 and 4.
    dataset = split({"a": 2, "b": 10, "c": 10}, shots=1, validation=3, test=6)
    assert per_class(dataset.test + dataset.validation) == [1, 4, 4]


def test_the_last_turn_is_chosen_by_the_seed_and_takes_no_class_twice():
    # 4 held out of 3 classes: one full turn, then one class more.
    chosen = {tuple(per_class(split(dict.fromkeys("abc", 9), seed=s, validation=1, test=3).test)) for s in range(9)}
    counts = [per_class(d.test + d.validation) for d in (split(dict.fromkeys("abc", 9), s) for s in range(9))]
    assert all(count == [1, 1, 1] for count in counts)
    assert len(chosen) > 1


def test_splits_are_disjoint_and_the_pool_is_all_but_the_held_out():
    dataset = split({"a": 9, "b": 9, "c": 9}, shots=2, validation=5, test=7)
    parts = [{dataset.image(e) for e in part} for part in (dataset.train, dataset.validation, dataset.test)]
    assert [len(part) for part in parts] == [6, 5, 7]
    assert len(set.union(*parts)) == 6 + 5 + 7
    assert set(dataset.pool) == {picture(i) for i in range(27)} - parts[1] - parts[2]
    assert parts[0] <= set(dataset.pool)


def test_the_seed_alone_decides():
    counts = {"a": 9, "b": 9, "c": 9}
    assert split(counts, seed=3) == split(counts, seed=3)
    assert split(counts, seed=3).train != split(counts, seed=4).train


def test_the_choice_never_changes_between_releases():
    # Recorded figures hang on this choice; a change here is a change of every result.
    dataset = split({"a": 6, "b": 6, "c": 6}, seed=0, shots=1, validation=1, test=2)
    assert (ids(dataset.train), ids(dataset.validation), ids(dataset.test)) == (
        ["a/2", "b/8", "c/12"],
        ["a/5"],
        ["b/9", "c/16"],
    )


def test_more_shots_keep_the_test_images_and_the_fewer_shots():
    one, four = (split({"a": 20, "b": 20, "c": 20}, shots=shots, validation=6, test=12) for shots in (1, 4))
    assert one.test == four.test and one.validation == four.validation
    assert set(ids(one.train)) < set(ids(four.train))


def test_no_validation_images_are_fine():
    assert split({"a": 5, "b": 5}, validation=0).validation == []


def test_too_few_images_for_the_shots_names_every_short_class():
    with pytest.raises(UserError, match=r"data.shots is 4.*data.shots=2:\n  'a': 3\n  'c': 2$"):
        split({"a": 3, "b": 9, "c": 2}, shots=4)


def test_too_few_images_left_says_what_fits():
    # 12 - 2 shots = 10 left for 20 + 30: 10 * 30 // 50 = 6 test and 4 validation.
    with pytest.raises(
        UserError, match=r"50 images, but 10 are left (.|\n)*set data.validation=4 data.test=6\n.*folds=5"
    ):
        split({"a": 6, "b": 6}, validation=20, test=30)
    dataset = split({"a": 6, "b": 6}, validation=4, test=6)  # the cure
    assert (len(dataset.validation), len(dataset.test)) == (4, 6)


def test_copies_are_left_out_in_whatever_encoding():
    several = examples({"a": 5, "b": 5})
    copy = LabelledImage("a/copy", encoded(open_image(several[0].image), "BMP"), "a")
    dataset = few_shot_split("toy", [*several, copy], ["a", "b"], section(), 0)
    assert len(dataset.pool) == 10 - 3
    assert dataset.copies == {"a/copy": "a/0"} and dataset.skipped == {}
    assert dataset.notes() == ["left out 1 copy of another image (a/copy is a/0)"]
    again = LabelledImage("b/copy", encoded(open_image(several[5].image), "BMP"), "b")
    notes = few_shot_split("toy", [copy, *several, again], ["a", "b"], section(), 0).notes()
    assert notes == ["left out 2 copies of other images (first: a/0 is a/copy)"]
    assert split({"a": 5, "b": 5}).notes() == []


def test_one_picture_with_two_labels_is_refused():
    several = examples({"a": 5, "b": 5})
    with pytest.raises(UserError, match=r"two labels.*\n  a/0 \('a'\) and b/wrong \('b'\)"):
        few_shot_split("toy", [*several, LabelledImage("b/wrong", several[0].image, "b")], ["a", "b"], section(), 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["rose"], "at least two classes"),
        (["rose", "--"], "'--' has no letter"),
        (
            ["hard-leaved orchid", "Hard_leaved Orchid"],
            "'hard-leaved orchid' and 'Hard_leaved Orchid' are the same",
        ),
        (["rose", "rose"], "the same answer"),
    ],
)
def test_labels_that_answers_could_not_tell_apart_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        check_labels(labels)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("wild\nrose", r"'wild\\nrose' has a control character"),
        ("ros\udce9", r"'ros\\udce9' has a control character or one that is no Unicode"),
        ("</answer>", "'</answer>' holds an answer tag"),
        ("<answer>x", "'<answer>x' holds an answer tag"),
    ],
)
def test_labels_that_no_answer_could_hold_are_refused(label, message):
    with pytest.raises(UserError, match=message):
        check_labels(["tulip", label])


def test_labels_in_any_script_with_spaces_and_hyphens_are_fine():
    check_labels(["rosé", "hard-leaved pocket orchid", "人参", "C", "C++", "ลิลลี่", "👍🏽", "7", "a/b"])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("</h1>", r"'</h1>' holds </h1>: .* a tag of the answer's layout\. Rename it: its folder, .*data\.classes"),
        ("<label>x</ Label >", r"holds </ Label >"),
        ("<think>", r"'<think>' holds <think>"),
        ("< Answer now>", r"holds < Answer now>"),
        ("unsure", r"'unsure' cannot be told from unsure and \(no class\), which predict .* Rename it"),
        ("UN-SURE", r"'UN-SURE' cannot be told"),
        ("(No Class)", r"'\(No Class\)' cannot be told"),
    ],
)
def test_names_that_would_be_taken_for_something_else_are_refused(tmp_path, label, message):
    with pytest.raises(UserError, match=message):
        check_names(["tulip", label])
    data = section(source=f"{__name__}:named", path=label)
    with pytest.raises(UserError, match=message):
        load_dataset(data, 0)
    dataset = named(data, 0)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(dataset, 0)))
    kept = load_dataset(section(source=f"{__name__}:named", path=label, manifest=tmp_path / "manifest.json"), 0)
    assert kept.classes == dataset.classes, "a run that was begun goes on"


def named(config: DataSection, seed: int) -> FewShotDataset:
    labels = {"tulip": 5, str(config.path): 5}
    return few_shot_split("toy", examples(labels), list(labels), config, seed)


def test_signs_that_form_no_tag_are_fine():
    check_names(["<5 mm", "> 10 mm", "a < b", "<3", "1 <> 2", "<NA>", "<thinker>", "unsure footing"])


@pytest.mark.parametrize("name", [UNSURE, NO_CLASS, "Unsure"])
def test_what_is_said_where_there_is_no_class_is_no_name(name):
    with pytest.raises(UserError, match="cannot be told from unsure and"):
        check_names(["tulip", name])


# --- aliases


def aliased(aliases: dict[str, list[str]]) -> FewShotDataset:
    return load_dataset(section(source=f"{__name__}:clothes", aliases=aliases), 0)


def clothes(config: DataSection, seed: int) -> FewShotDataset:
    return split({"t-shirt": 5, "trouser": 5, "café coat": 5}, seed)


def test_aliases_stand_on_every_example_of_their_label():
    aliases = {"t-shirt": ["tee", "T Shirt"], "trouser": ["pants", "trousers", "Hose"], "café coat": []}
    dataset = aliased(aliases)
    everything = [e for part in dataset.splits.values() for e in part]
    assert len(everything) == 6
    assert {(e.label, e.aliases) for e in everything} >= {("t-shirt", ("tee", "T Shirt")), ("café coat", ())}
    assert all(e.aliases == tuple(aliases[e.label]) for e in everything)
    # In whatever form of Unicode the label is written.
    decomposed = aliased({"cafe\u0301 coat": ["mantle"]})
    assert {e.aliases for e in decomposed.train} == {(), ("mantle",)}
    assert aliased({}) == clothes(section(), 0)


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        ({"tshirt": ["tee"]}, "data.aliases: 'tshirt' is none of the classes; did you mean 't-shirt'?"),
        ({"Trousers": ["pants"]}, "'Trousers' is none of the classes; did you mean 'trouser'?"),
        ({"hat": ["cap"]}, "'hat' is none of the classes; the classes are 't-shirt', 'trouser', 'café coat'"),
        ({"t-shirt": ["Trouser."]}, "'Trouser.' of 't-shirt' is the same answer as class 'trouser'"),
        ({"t-shirt": ["top"], "trouser": ["TOP"]}, "'TOP' of 'trouser' is the same answer as 'top' of 't-shirt'"),
        ({"t-shirt": ["tee", ""]}, "data.aliases: '' of 't-shirt' has no letter"),
        ({"t-shirt": ["--"]}, "'--' of 't-shirt' has no letter"),
        ({"t-shirt": ["<answer>"]}, "'<answer>' of 't-shirt' holds an answer tag"),
    ],
)
def test_aliases_that_say_too_much_or_too_little_are_refused(aliases, message):
    with pytest.raises(UserError) as caught:
        aliased(aliases)
    assert message in str(caught.value)


def test_aliases_come_from_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "run: {name: mine}\nmodel: {path: tiny}\nschedule: {steps: 1, prompts_per_step: 1}\ncluster: {device: cpu}\n"
        "data: {source: digits, aliases: {seven: [sept, '7'], one: [ace]}}\n"
    )
    config = load_config(str(tmp_path / "mine.yaml"), ["data.aliases.two=[deuce]"])
    assert config.data.aliases == {"seven": ["sept", "7"], "one": ["ace"], "two": ["deuce"]}
    (tmp_path / "mine.yaml").write_text(
        "run: {name: mine}\nmodel: {path: tiny}\ndata: {source: x, aliases: {a: tee}}\n"
    )
    with pytest.raises(UserError, match=r"data\.aliases\.a: must be a list, got 'tee'; write \[tee\]"):
        load_config(str(tmp_path / "mine.yaml"), [])


# --- batches


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 13])
def test_every_epoch_holds_each_image_once(size):
    dataset = split({"a": 9, "b": 9, "c": 9}, shots=2)  # 6 training images
    walked = [e for step in range(18) for e in dataset.batch(seed=5, step=step, size=size)]
    assert len(walked) == 18 * size
    for start in range(0, len(walked), 6):
        assert set(ids(walked[start : start + 6])) == set(ids(dataset.train))


def test_a_batch_is_pure_and_epochs_differ():
    dataset = split({"a": 9, "b": 9, "c": 9}, shots=4)
    assert dataset.batch(5, 7, 5) == dataset.batch(5, 7, 5)
    epochs = {tuple(ids(dataset.batch(5, epoch, 12))) for epoch in range(4)}
    assert len(epochs) == 4
    assert dataset.batch(5, 0, 12) != dataset.batch(6, 0, 12)


# --- digits


def test_digits_are_the_real_scans():
    dataset = load_dataset(section(source="digits", shots=4, validation=200, test=500), 0)
    assert dataset.classes[7] == "seven"
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [40, 200, 500]
    assert len(dataset.pool) == 1797 - 700
    assert per_class(dataset.test, dataset.classes) == [50] * 10
    assert per_class(dataset.validation, dataset.classes) == [20] * 10
    assert all(len(e.example_id) == len("digits/0017") for e in dataset.train)
    for example in dataset.train:
        image = open_image(dataset.image(example))
        paper, ink = image.convert("L").getextrema()
        assert image.size == (56, 56) and paper == 0 and ink > 200


def test_digits_have_no_path():
    with pytest.raises(UserError, match="digits, which is built in"):
        load_dataset(section(source="digits", path="photos"), 0)


def test_digits_do_not_take_other_classes():
    with pytest.raises(UserError, match=r"'ten' is in data\.classes but has no images"):
        load_dataset(section(source="digits", classes=["zero", "ten"]), 0)


# --- folders


def test_a_folder_of_folders_is_a_data_set(tmp_path):
    root = write_folder(tmp_path / "photos", {"rose": 5, "tulip": 5})
    (root / "README.txt").write_text("not a class")
    (root / ".git").mkdir()
    (root / "rose" / ".hidden.png").write_text("not an image")
    (root / "rose" / "notes.txt").write_text("not an image")
    (root / "rose" / "000.png").rename(root / "rose" / "000.PNG")
    dataset = load_dataset(section(path=root), 0)
    assert dataset.name == "photos" and dataset.classes == ["rose", "tulip"]
    assert len(dataset.pool) == 10 - 3
    first = dataset.train[0]
    assert dataset.image(first) == (root / first.example_id).read_bytes()
    assert first.example_id.startswith("rose/") and first.label == "rose"


def test_the_order_of_the_classes_can_be_given(tmp_path):
    root = write_folder(tmp_path, {"rose": 5, "tulip": 5})
    assert load_dataset(section(path=root, classes=["tulip", "rose"]), 0).classes == ["tulip", "rose"]


def test_classes_and_folders_must_agree(tmp_path):
    root = write_folder(tmp_path, {"rose": 5, "tulip": 5})
    with pytest.raises(UserError, match=r"'tulip' has images but is not.*\n  'tulp' is in data.classes but"):
        load_dataset(section(path=root, classes=["rose", "tulp"]), 0)


def test_a_missing_path_says_so(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, message in [
        (None, "data.path is missing"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "empty", "has no sub-folders"),
    ]:
        with pytest.raises(UserError, match=message):
            load_dataset(section(path=path), 0)


def test_an_empty_class_is_named(tmp_path):
    root = write_folder(tmp_path, {"rose": 5, "tulip": 5})
    (root / "daisy").mkdir()
    (root / "daisy" / "list.txt").touch()
    with pytest.raises(UserError, match=r"hold no image files .*\n  daisy/"):
        load_dataset(section(path=root), 0)


def test_class_folders_that_differ_in_case_are_both_named(tmp_path):
    root = write_folder(tmp_path, {"Rose": 5, "rose": 5})
    with pytest.raises(UserError, match="'Rose' and 'rose'"):
        load_dataset(section(path=root), 0)


def test_all_bad_files_are_listed_at_once(tmp_path):
    root = write_folder(tmp_path / "photos", {"rose": 5, "tulip": 5})
    (root / "rose" / "text.png").write_text("hello")
    (root / "rose" / "cut.png").write_bytes(photo()[:-200])
    (root / "tulip" / "gone.jpg").symlink_to("nothing.jpg")
    (root / "tulip" / "out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "outside.png").write_bytes(photo())
    os.mkfifo(root / "tulip" / "pipe.png")
    with pytest.raises(UserError) as caught:
        load_dataset(section(path=root), 0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("5 of the 15 image files")
    reasons = {line.split(":")[0].strip(): line for line in lines[1:]}
    assert "not an image" in reasons["rose/text.png"]
    assert "damaged" in reasons["rose/cut.png"]
    assert "link to nothing" in reasons["tulip/gone.jpg"]
    assert "link out of the folder" in reasons["tulip/out.png"]
    assert "not a file" in reasons["tulip/pipe.png"]


def test_a_long_list_of_bad_files_is_cut(tmp_path):
    root = write_folder(tmp_path, {"rose": 5, "tulip": 5})
    for i in range(45):
        (root / "rose" / f"bad{i:02d}.png").touch()
    with pytest.raises(UserError) as caught:
        load_dataset(section(path=root), 0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 40 + 1 and lines[-1] == "  and 5 more"


def test_labels_are_composed_however_the_folder_or_the_config_writes_them(tmp_path):
    root = write_folder(tmp_path, {"rose\u0301": 5, "hard-leaved pocket orchid": 5})
    classes = ["ros\u00e9", "hard-leaved pocket orchid"]
    assert sorted(load_dataset(section(path=root), 0).classes) == sorted(classes)
    dataset = load_dataset(section(path=root, classes=["rose\u0301", "hard-leaved pocket orchid"]), 0)
    assert dataset.classes == classes and {e.label for e in dataset.train} == set(classes)
    (root / "ros\u00e9").mkdir()
    with pytest.raises(UserError, match="are the same answer"):
        load_dataset(section(path=root), 0)


@pytest.mark.parametrize("key", ["path", "manifest", "held_out"])
def test_a_url_is_refused(key):
    for url in ("https://example.org/set.zip", "hf://datasets/owner/name", "file:///etc"):
        with pytest.raises(ValueError, match="nothing is fetched from a URL"):
            section(source="huggingface", **{key: url})


def apart(root: Path, train: dict[str, int], test: dict[str, int]) -> Path:
    write_folder(root / "train", train)
    for i, (label, count) in enumerate(test.items()):
        (root / "test" / label).mkdir(parents=True)
        for j in range(count):
            (root / "test" / label / f"{j}.png").write_bytes(picture(1000 + 50 * i + j))
    return root


def test_test_images_set_apart_stay_apart(tmp_path):
    root = apart(tmp_path / "photos", {"rose": 6, "tulip": 6}, {"rose": 5, "tulip": 5})
    (root / "test/rose/known.png").write_bytes((root / "train/rose/000.png").read_bytes())
    dataset = load_dataset(section(path=root, shots=2, validation=3, test=4), 0)
    assert dataset.name == "photos" and dataset.classes == ["rose", "tulip"]
    assert per_class(dataset.train, ["rose", "tulip"]) == [2, 2]
    assert all(e.example_id.startswith("train/") for e in dataset.train)
    held = [*dataset.validation, *dataset.test]
    assert len(dataset.validation) == 3 and len(set(ids(held))) == 7
    assert all(e.example_id == f"test/{e.label}/{e.example_id[-5:]}" for e in held)
    assert dataset.copies == {"test/rose/known.png": "train/rose/000.png"}
    assert set(dataset.pool) == {picture(i) for i in range(12)}  # all of train/, nothing of test/
    with pytest.raises(UserError, match=r"ask for 11 images, but 10 are left"):
        load_dataset(section(path=root, validation=5, test=6), 0)


def test_a_picture_with_one_label_in_train_and_another_in_test_is_refused(tmp_path):
    root = apart(tmp_path, {"rose": 6, "tulip": 6}, {"rose": 5, "tulip": 5})
    (root / "test/tulip/wrong.png").write_bytes((root / "train/rose/000.png").read_bytes())
    with pytest.raises(UserError, match=r"two labels.*\n  train/rose/000.png \('rose'\) and test/tulip/wrong.png"):
        load_dataset(section(path=root), 0)


def test_bad_images_on_both_sides_are_no_copies_of_each_other(tmp_path):
    root = apart(tmp_path, {"rose": 6, "tulip": 6}, {"rose": 5, "tulip": 5})
    (root / "train/rose/bad.png").touch()
    (root / "test/tulip/bad.png").touch()
    dataset = load_dataset(section(path=root, on_bad_image="skip"), 0)
    assert sorted(dataset.skipped) == ["test/tulip/bad.png", "train/rose/bad.png"] and dataset.copies == {}


def test_classes_of_the_test_folder_must_be_those_of_train(tmp_path):
    root = apart(tmp_path, {"rose": 6, "tulip": 6}, {"rose": 5, "lily": 5})
    with pytest.raises(UserError, match=r"test has classes that .*train has not; rename them .*:\n  'lily'$"):
        load_dataset(section(path=root), 0)


def test_folders_of_folders_are_explained(tmp_path):
    several = tmp_path / "several"
    for name in [f"set{i}" for i in range(8)]:
        write_folder(several / name, {"rose": 5, "tulip": 5})
    with pytest.raises(UserError) as caught:
        load_dataset(section(path=several), 0)
    assert "it holds set0/, set1/, set2/, set3/, set4/ and 3 more: where" in str(caught.value)
    assert f"where set0/ holds the classes, set data.path={several}/set0, or" in str(caught.value)
    assert load_dataset(section(path=several / "set0"), 0).classes == ["rose", "tulip"]  # the cure
    # Two classes may well be called train and test.
    toys = write_folder(tmp_path / "toys", {"train": 5, "test": 5})
    assert load_dataset(section(path=toys), 0).classes == ["test", "train"]


def test_a_class_folder_may_not_be_a_link_out(tmp_path):
    root = write_folder(tmp_path / "photos", {"rose": 5})
    outside = write_folder(tmp_path / "other", {"tulip": 5})
    (root / "tulip").symlink_to(outside / "tulip")
    with pytest.raises(UserError, match="tulip is a link out of"):
        load_dataset(section(path=root), 0)


# --- sources of one's own


def toy(config: DataSection, seed: int) -> FewShotDataset:
    return split({"a": 9, "b": 9}, seed, shots=config.shots)


def number(config: DataSection, seed: int) -> int:
    return seed


def twice(config: DataSection, seed: int) -> FewShotDataset:
    several = examples({"a": 5, "b": 5})
    return few_shot_split("toy", [*several, LabelledImage("a/0", picture(99), "a")], ["a", "b"], config, seed)


def unreadable(config: DataSection, seed: int) -> FewShotDataset:
    train = [LabelledImage("one", b"text", "a"), LabelledImage("two", picture(1), "b")]
    return FewShotDataset.of(
        "unreadable", ["a", "b"], train, [], [LabelledImage("three", picture(2)[:40], "a")], [b"", picture(1)]
    )


def partly_unreadable(config: DataSection, seed: int) -> FewShotDataset:
    bad = [LabelledImage("bad", b"text", "a"), LabelledImage("worse", b"", "b")]
    return few_shot_split("partly", [*examples({"a": 5, "b": 5}), *bad], ["a", "b"], config, seed)


def test_images_of_ones_own_source_are_checked_as_well():
    with pytest.raises(UserError) as caught:
        load_dataset(section(source=f"{__name__}:unreadable"), 0)
    first, *lines = str(caught.value).splitlines()
    assert "3 of the 5 images of" in first
    assert [line.split(": ")[0] for line in lines] == ["  one", "  three", "  pool[0]"]


def test_a_source_of_ones_own_may_leave_bad_images_to_the_split():
    with pytest.raises(
        UserError, match=r"^2 of the 12 images of partly cannot be used(.|\n)*bad: not(.|\n)*worse: empty"
    ):
        load_dataset(section(source=f"{__name__}:partly_unreadable"), 0)
    dataset = load_dataset(section(source=f"{__name__}:partly_unreadable", on_bad_image="skip"), 0)
    assert list(dataset.skipped) == ["bad", "worse"] and dataset.splits == split({"a": 5, "b": 5}).splits
    assert dataset.notes()[0].splitlines() == [
        "skipped 2 images that cannot be used:",
        f"  bad: not an image in one of the formats {', '.join(FORMATS)}",
        "  worse: empty, 0 bytes",
    ]


def mixed_up(config: DataSection, seed: int) -> FewShotDataset:
    train = examples({"a": 1, "b": 1})
    return FewShotDataset.of("mixed up", ["a", "b"], train, [], train[:1], [])


@pytest.mark.parametrize("separator", [":", "."])
def test_a_dotted_path_names_a_source(separator):
    dataset = load_dataset(section(source=f"{__name__}{separator}toy", shots=3), 4)
    assert dataset == split({"a": 9, "b": 9}, 4, shots=3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "'digit' is unknown. Did you mean digits?"),
        ("no_such_package.module:load", "no module 'no_such_package'"),
        (f"{__name__}:toyy", "Did you mean toy?"),
        (f"{__name__}:number", "must return a FewShotDataset, not int"),
        (f"{__name__}:mixed_up", "a/0 twice, or in two splits"),
        (f"{__name__}:twice", "toy has several images of one id; give each its own:\n  a/0"),
        (":toy", "not a dotted path"),
        ("my-module:toy", "not a dotted path"),
        ("my-module.py:toy", "names a file: name the module"),
    ],
)
def test_a_wrong_source_is_explained(source, message):
    with pytest.raises(UserError, match=message):
        load_dataset(section(source=source), 0)


# --- images


def photo() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, 0 bytes"),
        (b"hello", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (photo()[:-200], "damaged"),
        (png_header(10_000, 9_000), "too many pixels"),  # 90 million: above Pillow's warning
        (png_header(60_000, 60_000), "too many pixels"),  # 3.6 thousand million: above Pillow's error
        (bytes(MAX_BYTES + 1), "larger than 50 MB"),
    ],
)
def test_bad_images_are_refused(data, message):
    with pytest.raises(UserError, match=f"^photos/a.png: {message}"):
        check_image(data, "photos/a.png")


def test_floating_point_images_are_refused():
    with pytest.raises(UserError, match="32-bit numbers"):
        check_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "a.tif")


def test_equal_pictures_have_equal_digests_and_others_not():
    image = Image.new("L", (2, 3), 200)
    digest = check_image(encoded(image), "")
    assert check_image(encoded(image.convert("RGB"), "BMP"), "") == digest
    assert check_image(encoded(image.resize((3, 2))), "") != digest


def sixteen_bit(value: int) -> Image.Image:
    return Image.fromarray(np.full((2, 2), value, dtype=np.uint16))


@pytest.mark.parametrize(
    ("image", "file_format", "pixel"),
    [
        (Image.new("L", (2, 2), 90), "PNG", (90, 90, 90)),
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (sixteen_bit(65535), "PNG", (255, 255, 255)),
        (sixteen_bit(32768), "TIFF", (128, 128, 128)),  # 32768 / 257 = 127.5, to even
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "PNG", (204, 204, 204)),  # 255 * (1 - 51/255)
        (Image.new("LA", (2, 2), (7, 255)), "PNG", (7, 7, 7)),
        (Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF", (0, 255, 255)),
        (Image.new("RGB", (2, 2), (1, 2, 3)).quantize(2), "GIF", (1, 2, 3)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(image, file_format, pixel):
    opened = open_image(encoded(image, file_format))
    assert opened.mode == "RGB" and opened.size == (2, 2)
    assert opened.getpixel((0, 0)) == pixel


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert open_image(encoded(image, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_turns_the_picture():
    # Orientation 6: shown turned by 90 degrees clockwise, so the left pixel comes out on top.
    image = Image.new("RGB", (2, 1), (0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_image(encoded(image, exif=exif))
    assert turned.size == (1, 2)
    assert turned.getpixel((0, 0)) == (255, 0, 0) and turned.getpixel((0, 1)) == (0, 0, 255)
