import io
import json
import shutil
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from sklearn.datasets import load_sample_images

from rft_cluster.common.errors import Unavailable, UserError
from rft_cluster.config import DataSection
from rft_cluster.data import hub, load_dataset
from rft_cluster.data.archive import flower_classes
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.data.reading import Labelled, Unread
from rft_cluster.prompts import render_template
from tests.unit.data.test_archive import write_archive

QUESTION = "Which flower?\nThink first. "


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def picture(number: int) -> dict:
    return {"bytes": encoded(Image.new("RGB", (4, 4), (number // 256 * 99, number % 256, 9))), "path": None}


def rows(labels: list, label: object = None, start: int = 0, **columns) -> Dataset:
    """Images numbered from `start`, in columns `image` and `label`."""
    features = Features(
        {"image": datasets.Image(), "label": label or Value("string"), **dict.fromkeys(columns, Value("string"))}
    )
    images = [picture(start + i) for i in range(len(labels))]
    return Dataset.from_dict({"image": images, "label": labels, **columns}, features=features)


def published(labels: list[str], problems: list[str] | None = None) -> Dataset:
    """Visual-RFT's layout."""
    solutions = [f"<answer>{label}</answer>" for label in labels]
    columns = {"problem": problems or [QUESTION] * len(labels), "solution": solutions}
    return rows(labels, **columns).remove_columns("label")


def save(data: Dataset | DatasetDict, folder: Path) -> Path:
    data.save_to_disk(str(folder))
    return folder


def load(path: Path | str | None, seed: int = 0, **values) -> FewShotDataset:
    section = {"source": "huggingface", "path": path, "shots": 2, "validation": 1, "test": 2, **values}
    return load_dataset(DataSection(**section), seed)


def refusal(path: Path | str | None, **values) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **values)
    return str(caught.value)


def sizes(dataset: FewShotDataset) -> list[int]:
    return [len(split) for split in (dataset.train, dataset.validation, dataset.test)]


# --- layouts


def test_no_server_is_asked_about_files_that_are_here(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: asked.append(where) or [])
    plain(tmp_path / "set/train.parquet", [picture(i) for i in range(10)], STRUCT, label=["a", "b"] * 5)
    assert sizes(load(tmp_path / "set")) == [4, 1, 2]
    assert not asked


def test_class_labels_keep_their_order(tmp_path):
    names = ClassLabel(names=["tulip", "rose", "unused"])
    dataset = load(save(rows([0, 1] * 5, names), tmp_path / "flowers"))
    assert dataset.name == "flowers" and dataset.classes == ["tulip", "rose"]
    assert sizes(dataset) == [4, 1, 2] and dataset.problem is None
    for example in [*dataset.train, *dataset.validation, *dataset.test]:
        row = int(example.example_id.removeprefix("train/"))
        assert dataset.image(example) == picture(row)["bytes"] and example.label == ["tulip", "rose"][row % 2]
    assert {dataset.image(e) for e in dataset.train} < set(dataset.pool) and len(dataset.pool) == 10 - 3
    assert load(tmp_path / "flowers", seed=0) == dataset


def test_columns_can_be_called_otherwise(tmp_path):
    data = rows(["b", "a "] * 5).rename_columns({"image": "photo", "label": "species"})
    folder = save(data, tmp_path / "photos")
    assert load(folder, image_column="photo", label_column="species").classes == ["a", "b"]
    assert load(folder) == load(folder, image_column="photo", label_column="species")  # no others can be meant
    two = save(data.add_column("breed", ["x", "y"] * 5), tmp_path / "two")
    assert "has no column 'label'; it has species, breed: set data.label_column" in refusal(two)
    assert load(two, label_column="breed").classes == ["x", "y"]
    assert "has no column 'foto'; it has photo, species" in refusal(folder, image_column="foto")


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    rows(["a", "b"] * 5).to_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    rows(["a", "b"] * 3, start=50).to_parquet(tmp_path / "set/data/test-00000-of-00001.parquet")
    dataset = load(tmp_path / "set")
    assert sizes(dataset) == [4, 1, 2]
    assert all(e.example_id.startswith("test/") for e in dataset.test)


def test_parquet_files_of_others_hold_structs(tmp_path):
    (tmp_path / "set").mkdir()
    plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")})
    images = [picture(i) for i in range(10)]
    Dataset.from_dict({"image": images, "label": ["a", "b"] * 5}, features=plain).to_parquet(tmp_path / "set/a.parquet")
    assert sizes(load(tmp_path / "set")) == [4, 1, 2]


def test_the_published_layout_is_detected(tmp_path):
    folder = save(DatasetDict(train=published([" rose ", "tulip"] * 5)), tmp_path / "set")
    dataset = load(folder)
    assert dataset.classes == ["rose", "tulip"] and {e.label for e in dataset.train} == {"rose", "tulip"}
    assert dataset.problem == QUESTION
    assert render_template("problem", "flower", dataset.classes, problem=dataset.problem) == QUESTION


def test_several_questions_are_refused(tmp_path):
    data = published(["a", "b"] * 5, problems=["Which?", "What?"] * 5)
    dataset = load(save(data, tmp_path / "set"))  # of no concern to other templates
    with pytest.raises(UserError, match=r"2 different texts(.|\n)*\n  'What\?'\n  'Which\?'"):
        print(dataset.problem)


def test_the_problem_template_needs_a_problem():
    with pytest.raises(UserError, match="the data set brings no question"):
        render_template("problem", "flower", [])
    with pytest.raises(UserError, match="problem holds a special token"):
        render_template("problem", "flower", [], problem="<|image_pad|> Which?")
    with pytest.raises(UserError, match="problem gives an empty text"):
        render_template("problem", "flower", [], problem=" ")
    with pytest.raises(UserError, match=r"neither a file nor one of .*problem.*Did you mean problem\?"):
        render_template("problm", "flower", [])


def test_solutions_without_an_answer_are_listed(tmp_path):
    data = published(["a", "b"] * 5)
    solutions = [text if i % 5 else "a" for i, text in enumerate(data["solution"])]
    folder = save(data.remove_columns("solution").add_column("solution", solutions), tmp_path / "set")
    message = refusal(folder)
    assert "2 of the 10 rows of set, split train have no label" in message
    assert "\n  row 5: solution without one <answer>label</answer>" in message


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([[1.0], [2.0]] * 5, datasets.List(Value("float64")), "must hold one name or number an image, not List("),
        (["a", None] * 5, None, "row 1: no label"),
        ([0, -1] * 5, ClassLabel(names=["a", "b"]), "row 1: no label"),
        (["Rose", "rose"] * 5, None, "'Rose' and 'rose' are the same answer"),
    ],
)
def test_labels_that_will_not_do_are_refused(tmp_path, labels, kind, message):
    assert message in refusal(save(rows(labels, kind), tmp_path / "set"))


# --- images


def test_only_the_chosen_images_are_decoded(tmp_path):
    data = rows(["a", "b"] * 5)
    good = load(save(data, tmp_path / "good"))
    chosen = {int(e.example_id[-6:]) for e in [*good.train, *good.validation, *good.test]}
    unused = next(i for i in range(10) if i not in chosen)

    assert load(save(damaged(data, unused), tmp_path / "unused")).test == good.test
    bad = int(good.test[0].example_id[-6:])
    message = refusal(save(damaged(data, unused, bad), tmp_path / "bad"))
    assert "1 of the 7 images chosen from bad" in message and f"train/{bad:06d}: not an image" in message


def damaged(data: Dataset, *numbers: int) -> Dataset:
    def damage(row, index):
        return {"image": {"bytes": b"no image" + bytes([index]), "path": None}} if index in numbers else row

    raw = data.cast_column("image", datasets.Image(decode=False))
    return raw.map(damage, with_indices=True, features=raw.features)


def test_bad_images_are_skipped_in_each_split(tmp_path):
    train, test = damaged(rows(["a", "b"] * 5), 0, 3), damaged(rows(["a", "b"] * 5, start=50), 1, 4, 8)
    folder = save(DatasetDict(train=train, test=test), tmp_path / "set")
    wanted = {"shots": 4, "validation": 3, "test": 4}
    assert "train/000000: not an image" in refusal(folder, **wanted)
    dataset = load(folder, **wanted, on_bad_image="skip")
    assert sorted(e.example_id for e in dataset.train) == [f"train/{i:06d}" for i in (1, 2, 4, 5, 6, 7, 8, 9)]
    held = sorted(e.example_id for e in [*dataset.validation, *dataset.test])
    assert held == [f"test/{i:06d}" for i in (0, 2, 3, 5, 6, 7, 9)]
    # Those that no draw came upon are not known to be bad.
    assert set(dataset.skipped) <= {*(f"test/{i:06d}" for i in (1, 4, 8)), "train/000000", "train/000003"}
    assert "train/000000" in dataset.skipped and "test/000004" in dataset.skipped
    message = refusal(folder, shots=4, validation=4, test=4, on_bad_image="skip")
    assert "but 7 are left" in message and "without the 3 skipped that cannot be used" in message


def test_bad_images_of_the_archive_are_skipped(flowers, tmp_path):
    root = Path(shutil.copytree(flowers, tmp_path / "archive"))
    folder = flower_set(flowers, tmp_path / "set")
    (root / "jpg/image_00200.jpg").write_bytes(b"no image")
    (root / "jpg/image_00300.jpg").write_bytes((root / "jpg/image_00300.jpg").read_bytes()[:300])
    bomb = (
        b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b",\0\0\0\0" + struct.pack("<HH", 60_000, 60_000)
    )
    (root / "jpg/image_00400.jpg").write_bytes(bomb + b"\0\x02\x02\x4c\x01\0;")
    values = {"shots": 1, "validation": 100, "held_out": root}
    message = refusal(folder, test=203, **values)
    assert message.startswith("3 of the 408 images in data.held_out") and message.count("\n  jpg/") == 3
    dataset = load(folder, test=203, on_bad_image="skip", **values)
    assert sorted(dataset.skipped) == [f"jpg/image_00{n}00.jpg" for n in (2, 3, 4)]
    assert "but 303 are left" in refusal(folder, test=204, on_bad_image="skip", **values)


def test_a_picture_with_one_label_in_train_and_another_in_test_is_refused(tmp_path):
    splits = DatasetDict(train=rows(["a", "b"] * 5), test=rows(["b", "a"] * 4, start=8))
    message = refusal(save(splits, tmp_path / "set"))
    assert "two labels" in message and "\n  train/000008 ('a') and test/000000 ('b')" in message


@pytest.mark.parametrize("name", ["../../other/data-00000-of-00001.arrow", "/{other}", "link.arrow", "a::b", ".."])
def test_a_saved_set_may_not_name_files_outside(tmp_path, name):
    other = save(rows(["a", "b"] * 5), tmp_path / "other") / "data-00000-of-00001.arrow"
    folder = save(DatasetDict(train=rows(["a", "b"] * 5)), tmp_path / "set")
    (folder / "train/link.arrow").symlink_to(other)
    state = json.loads((folder / "train/state.json").read_text())
    state["_data_files"] = [{"filename": name.format(other=str(other)[1:])}]
    (folder / "train/state.json").write_text(json.dumps(state))
    assert "names files or folders that do not lie in it" in refusal(folder)


def test_a_saved_set_may_not_name_splits_outside(tmp_path):
    save(rows(["a", "b"] * 5), tmp_path / "other")
    folder = save(DatasetDict(train=rows(["a", "b"] * 5)), tmp_path / "set")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "../other"]}))
    assert "do not lie in it; save the set anew with save_to_disk:\n  '../other'" in refusal(folder)


def test_a_format_that_was_saved_does_not_matter(tmp_path):
    data = rows([0, 1] * 5, ClassLabel(names=["a", "b"]))
    assert load(save(data.with_format("numpy"), tmp_path / "numpy/x")) == load(save(data, tmp_path / "plain/x"))


def test_class_labels_are_cleaned_and_wrong_numbers_are_no_labels(tmp_path):
    names = ClassLabel(names=[" ros\u00e9 ", "cafe\u0301"])
    assert load(save(rows([0, 1] * 5, names), tmp_path / "set")).classes == ["ros\u00e9", "caf\u00e9"]
    table = rows([0, 1, 7] * 4, Value("int64")).data.table.replace_schema_metadata(None)
    folder = tmp_path / "parquet"
    folder.mkdir()
    labelled = Dataset(table).cast_column("image", datasets.Image())
    labelled.info.features["label"] = ClassLabel(names=["a", "b"])
    labelled.to_parquet(folder / "train.parquet")
    assert "row 2: no label" in refusal(folder)


def test_a_path_in_a_row_is_not_followed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1)["bytes"])
    plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")})
    images = [{"bytes": None, "path": str(tmp_path / "secret.png")}, *(picture(i) for i in range(2, 8))]
    data = Dataset.from_dict({"image": images, "label": ["a", "b", "a", "b", "a", "b", "a"]}, features=plain)
    data.to_parquet(tmp_path / "set/a.parquet")
    message = refusal(tmp_path / "set")
    assert message.startswith("1 of the 7 rows of set, split train cannot be used")
    assert message.endswith("\n  train/000000: no image in the row, at most a path, which is not followed")
    dataset = load(tmp_path / "set", shots=1, on_bad_image="skip")
    assert dataset.skipped == {"train/000000": "no image in the row, at most a path, which is not followed"}
    assert sizes(dataset) == [2, 1, 2]
    text = Dataset.from_dict({"image": [str(tmp_path / "secret.png")] * 6, "label": ["a", "b"] * 3})
    assert "'image' of text, split train must hold images" in refusal(save(text, tmp_path / "text"))


def test_copies_are_left_out(tmp_path):
    data = datasets.concatenate_datasets([rows(["a", "b"] * 5), rows(["a", "b"])])
    dataset = load(save(data, tmp_path / "set"))
    assert dataset.copies == {"train/000010": "train/000000", "train/000011": "train/000001"}


# --- splits


def test_a_test_split_serves_the_held_out_images_without_training_images(tmp_path):
    names = ClassLabel(names=["a", "b"])
    test = rows([0, 1] * 4, names, start=8)  # its first two are the last two of train
    splits = DatasetDict(train=rows([0, 1] * 5, names), validation=rows([0, 1], names, start=90), test=test)
    dataset = load(save(splits, tmp_path / "set"), validation=2, test=4)
    assert sorted(e.example_id for e in dataset.validation) == ["validation/000000", "validation/000001"]
    assert {e.example_id for e in dataset.test} < {f"test/{i:06d}" for i in range(2, 8)} and len(dataset.test) == 4
    assert all(e.example_id.startswith("train/") for e in dataset.train)
    assert dataset.copies == {"test/000000": "train/000008", "test/000001": "train/000009"}
    assert "7 images, but 6 are left" in refusal(tmp_path / "set", validation=2, test=7)
    assert "has a test split of its own" in refusal(tmp_path / "set", held_out=tmp_path)


def test_labels_only_in_the_test_split_are_refused_unless_they_are_to_be_unseen(tmp_path):
    folder = save(DatasetDict(train=rows(["a", "b"] * 5), test=rows(["a", "c"] * 5, start=50)), tmp_path / "set")
    message = refusal(folder)
    assert "classes that set, split train has not; rename them as there, or remove them, or name them in " in message
    assert message.endswith("data.unseen_classes to test them without training:\n  'c'")
    dataset = load(folder, unseen_classes=["c"], validation=0)
    assert (dataset.classes, dataset.unseen, sizes(dataset)) == (["a", "b", "c"], ("c",), [4, 0, 2])


def test_an_only_split_of_another_name_is_drawn_from(tmp_path):
    assert sizes(load(save(DatasetDict(test=rows(["a", "b"] * 5)), tmp_path / "set"))) == [4, 1, 2]
    several = DatasetDict(one=rows(["a", "b"] * 5), two=rows(["a", "b"] * 5))
    assert "no split train to learn from, but one, two" in refusal(save(several, tmp_path / "several"))


def test_a_set_of_exactly_its_training_images(tmp_path):
    folder = save(published(["rose", "tulip"] * 4), tmp_path / "set")
    dataset = load(folder, shots=4, validation=0, test=0)
    assert sizes(dataset) == [8, 0, 0] and len(dataset.pool) == 8
    message = refusal(folder, shots=4, validation=0, test=2)
    assert "only its 8 training images" in message and "data.held_out" in message


# --- held-out images of an archive


def flower_set(root: Path, folder: Path, change: dict[str, str] | None = None) -> Path:
    """The first image of each class of the archive in `root`, encoded anew, in the published layout."""
    labels, images = [], []
    for number, label in enumerate(flower_classes(), 1):
        image = Image.open(root / f"jpg/image_{number:05d}.jpg").convert("RGBA")
        labels.append((change or {}).get(label, label.replace("-", " ").title()))
        images.append({"bytes": encoded(image), "path": None})
    data = published(labels).remove_columns("image")
    return save(data.add_column("image", images).cast_column("image", datasets.Image()), folder)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory) -> Path:
    """The archive of `write_archive`, with pictures that can be told apart by sight."""
    root = write_archive(tmp_path_factory.mktemp("held_out") / "flowers")
    noise = np.random.default_rng(0)
    for path in sorted((root / "jpg").iterdir()):
        small = Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((48, 32), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def test_held_out_images_come_from_the_archive_without_the_training_images(flowers, tmp_path):
    folder = flower_set(flowers, tmp_path / "set")
    dataset = load(folder, shots=1, validation=102, test=204, held_out=flowers)
    assert sizes(dataset) == [102, 102, 204]
    held = [e.example_id for e in [*dataset.validation, *dataset.test]]
    # Of 408 images the first 102 are trained on, encoded otherwise; the rest are exactly what was asked for.
    assert sorted(held) == [f"jpg/image_{number:05d}.jpg" for number in range(103, 409)]
    assert {e.label for e in dataset.test} <= set(dataset.classes) and "Pink Primrose" in dataset.classes
    assert dataset.copies == {f"jpg/image_{number:05d}.jpg": f"train/{number - 1:06d}" for number in range(1, 103)}
    assert "307 images, but 306 are left" in refusal(folder, shots=1, validation=103, test=204, held_out=flowers)


def test_held_out_images_come_from_the_downloaded_archive_if_the_set_has_none(flowers, tmp_path, monkeypatch):
    folder = flower_set(flowers, tmp_path / "set")
    fetched = []
    monkeypatch.setattr(hub, "official_archive", lambda: fetched.append(1) or flowers)
    wanted = {"shots": 1, "validation": 10, "test": 20}
    assert load(folder, **wanted, download=True) == load(folder, **wanted, held_out=flowers) and fetched == [1]
    own = DatasetDict(train=rows(["a", "b"] * 5), test=rows(["a", "b"] * 5, start=50))
    assert sizes(load(save(own, tmp_path / "own"), download=True)) == [4, 1, 2]
    assert sizes(load(folder, shots=1, validation=0, test=0, download=True)) == [102, 0, 0]
    assert fetched == [1]


def test_the_archive_is_left_alone_when_nothing_is_wanted_of_it(flowers, tmp_path):
    folder = flower_set(flowers, tmp_path / "set")
    assert sizes(load(folder, shots=1, validation=0, test=0, held_out=tmp_path / "nowhere")) == [102, 0, 0]


def test_class_names_must_agree_with_the_archive(flowers, tmp_path):
    folder = flower_set(flowers, tmp_path / "set", {"rose": "Rosa"})
    message = refusal(folder, shots=1, held_out=flowers)
    assert "\n  'Rosa' is in set only\n  'rose' is in the archive only" in message
    assert "data.held_out: " in refusal(folder, shots=1, held_out=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "encode",
    [
        lambda image: encoded(image.convert("RGBA")),
        lambda image: encoded(image, "JPEG", quality=75),
        lambda image: encoded(image.resize((image.width // 2, image.height // 2)), "JPEG"),
        lambda image: encoded(image, "WEBP", quality=80),
    ],
)
def test_a_photograph_is_known_again_in_another_encoding(encode):
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    china, flower = (encoded(photo, "JPEG", quality=95) for photo in photos)
    mirrored = encoded(photos[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG")
    archive = {"flower": flower, "china": china, "mirrored": mirrored}
    candidates = Unread([Labelled(name, "x") for name in archive], list(archive), archive.__getitem__, "")
    train = [LabelledImage("0", encode(photos[1].rotate(90)), "x"), LabelledImage("1", encode(photos[0]), "x")]
    assert hub._known_pictures(FewShotDataset.of("toy", ["x", "y"], train, [], [], []), candidates) == (
        {"china": "1"},
        {},
    )


# --- getting at the set


def test_a_path_that_is_nothing_is_explained(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert "data.path is missing" in refusal(None)
    assert "neither a file or folder nor a name on the hub" in refusal(tmp_path / "nowhere")
    assert "cannot be read as a data set" in refusal(tmp_path / "file")
    assert "holds no parquet files" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"_data_files": [{}]}'])
def test_a_damaged_folder_is_explained(tmp_path, content):
    folder = save(rows(["a", "b"] * 5), tmp_path / "set")
    (folder / "state.json").write_text(content)
    assert "cannot be read as a data set" in refusal(folder)


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_file_that_was_cut_is_explained_once(tmp_path, kind, left, capfd):
    data = rows(["a", "b"] * 5)
    folder = save(data, tmp_path / "set") if kind == "arrow" else tmp_path / "parquet"
    if kind == "parquet":
        folder.mkdir()
        data.to_parquet(folder / "train.parquet")
    file = next(folder.glob(f"*.{kind}"))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])
    capfd.readouterr()  # a progress bar of `to_parquet`
    assert "cannot be read as a data set" in refusal(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), r"the hub cannot be reached \(no route\)(.|\n)*save_to_disk"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "has no such data set .*hf auth login"),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot be read as a data set .*scripts"),
    ],
)
def test_a_hub_that_does_not_give_the_set_is_explained(monkeypatch, tmp_path, error, message):
    monkeypatch.chdir(tmp_path)
    asked = []

    def refuse(*arguments, **options):
        asked.append((arguments, options))
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=message) as caught:
        load("laolao77/ViRFT_CLS_flower_4_shot")
    assert isinstance(caught.value, Unavailable) == isinstance(error, ConnectionError)
    assert asked == [(("laolao77/ViRFT_CLS_flower_4_shot",), {})]


# --- as people write parquet files


def plain(path: Path, images: list, feature: object, **columns) -> Path:
    """A parquet file without anything that `datasets` adds to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {
        name: Value({int: "int64", float: "float64", bool: "bool"}.get(type(values[0]), "string"))
        for name, values in columns.items()
    }
    data = Dataset.from_dict({"image": images, **columns}, features=Features({"image": feature, **kinds}))
    pyarrow.parquet.write_table(data.data.table.replace_schema_metadata(None), path)
    return path


STRUCT = {"bytes": Value("binary"), "path": Value("string")}
WRAPPINGS = {
    "struct": (lambda image: image, STRUCT),
    "bytes": (lambda image: image["bytes"], Value("binary")),
    "large bytes": (lambda image: image["bytes"], Value("large_binary")),
    "list of structs": (lambda image: [image], datasets.List(STRUCT)),
    "list of bytes": (lambda image: [image["bytes"]], datasets.List(Value("binary"))),
}
WRITTEN = {
    "text": ["a", "b"],
    "numbers": [0, 1],
    "whole floats": [0.0, 1.0],
    "truth values": [False, True],
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("column", ["label", "class", "answer"])
@pytest.mark.parametrize("single", [False, True])
def test_every_way_to_write_an_image_and_its_label(tmp_path, wrapping, written, column, single):
    wrap, feature = WRAPPINGS[wrapping]
    images = [wrap(picture(i)) for i in range(10)]
    file = plain(tmp_path / "set/train.parquet", images, feature, **{column: WRITTEN[written] * 5, "note": ["x"] * 10})
    dataset = load(file if single else file.parent)
    names = {"text": ["a", "b"], "truth values": ["false", "true"]}.get(written, ["0", "1"])
    assert dataset.classes == names and sizes(dataset) == [4, 1, 2]
    for example in (e for split in dataset.splits.values() for e in split):
        number = int(example.example_id.removeprefix("train/"))
        assert (dataset.image(example), example.label) == (picture(number)["bytes"], names[number % 2])
    if written in ("numbers", "whole floats"):
        assert load(file, classes=["no", "yes"]).classes == ["no", "yes"]


@pytest.mark.parametrize("images", [[], [picture(1), picture(2)]])
def test_rows_of_several_images_or_none_are_listed(tmp_path, images):
    rows_ = [[picture(i)] for i in range(9)] + [images]
    plain(tmp_path / "set/a.parquet", rows_, datasets.List(STRUCT), label=["a", "b"] * 5)
    assert f"train/000009: {len(images)} images in the row, one is needed" in refusal(tmp_path / "set")
    assert sizes(load(tmp_path / "set", on_bad_image="skip")) == [4, 1, 2]


def test_a_label_column_that_is_set_wins(tmp_path):
    data = rows(["a", "b"] * 5, solution=["The flower is a rose"] * 10)
    folder = save(data, tmp_path / "set")
    message = refusal(folder)
    assert (
        "column solution of set, split train holds no <answer>label</answer>" in message and "one of label" in message
    )
    assert load(folder, label_column="label").classes == ["a", "b"]
    assert load(save(published(["a", "b"] * 5), tmp_path / "published"), label_column="label").classes == ["a", "b"]
    tagged = save(published(["a", "b"] * 5).rename_column("solution", "mine"), tmp_path / "tagged")
    assert load(tagged, label_column="mine").classes == ["a", "b"]


@pytest.mark.parametrize("missing", ["-1", "null", "no column"])
def test_a_test_split_without_labels_is_left_out(tmp_path, missing):
    names = ClassLabel(names=["a", "b"])
    test = rows([-1 if missing == "-1" else None] * 6, names, start=50)
    if missing == "no column":
        test = test.remove_columns("label")
    folder = save(DatasetDict(train=rows([0, 1] * 5, names), test=test), tmp_path / "set")
    dataset = load(folder)
    assert {e.example_id.split("/")[0] for e in dataset.test} == {"train"}
    assert dataset.notes() == ["split test has no labels: it is left out"]


def test_splits_can_be_chosen(tmp_path):
    parts = {name: rows(["a", "b"] * 5, start=20 * i) for i, name in enumerate(("Train", "validation", "extra"))}
    folder = save(DatasetDict(parts), tmp_path / "set")
    first = load(folder)
    assert {e.example_id.split("/")[0] for e in (*first.validation, *first.test)} == {"validation"}
    assert first.notes() == ["splits that are not used: extra (data.splits names those to use)"]
    dataset = load(folder, splits={"train": "extra", "test": "Train"})
    assert {e.example_id.split("/")[0] for e in dataset.train} == {"extra"}
    assert {e.example_id.split("/")[0] for e in dataset.test} == {"Train"}
    assert "data.splits: set has no 'nope'; it has Train, validation, extra" in refusal(
        folder, splits={"train": "nope"}
    )


@pytest.mark.parametrize(
    "names", [("plain", "augmented"), ("en/data", "de/data"), ("v1/train", "v2/train"), (".", "old")]
)
def test_configurations_of_a_set_are_not_mixed(tmp_path, names):
    for number, name in enumerate(names):
        plain(
            tmp_path / "hub" / name / "train-0.parquet",
            [picture(20 * number + i) for i in range(10)],
            STRUCT,
            label=["a", "b"] * 5,
        )
    message = refusal(tmp_path / "hub")
    assert "several configurations" in message
    paths = [line.removeprefix("  data.path=") for line in message.splitlines()[1:]]
    assert len(paths) == 2 and sizes(load(paths[1])) == [4, 1, 2]


def test_splits_in_folders_are_one_configuration(tmp_path):
    for number, name in enumerate(("data/train", "data/test")):
        plain(
            tmp_path / name / "0.parquet", [picture(20 * number + i) for i in range(10)], STRUCT, label=["a", "b"] * 5
        )
    assert {e.example_id.split("/")[0] for e in load(tmp_path).test} == {"test"}


def test_folders_of_pictures_and_tables_are_sent_to_their_source(tmp_path):
    (tmp_path / "set/rose").mkdir(parents=True)
    (tmp_path / "set/rose/a.png").write_bytes(picture(1)["bytes"])
    assert "For pictures in folders: data.source=folder" in refusal(tmp_path / "set")
    (tmp_path / "set/metadata.csv").touch()
    assert f"data.source=csv data.path={tmp_path}/set/metadata.csv" in refusal(tmp_path / "set")
    assert "is a table: set data.source=csv" in refusal(tmp_path / "set/metadata.csv")


WORDS = {"train": ("train", "Training", "TRAIN"), "test": ("test", "Testing", "TEST")}
FORMS = ("{}.parquet", "{}-00000-of-00001.parquet", "data/{}/0.parquet", "flowers_{}_01.parquet", "{}/x.parquet")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("folder", ["set", "my set #1 [2024]"])
def test_splits_of_parquet_files_are_known_by_any_usual_name(tmp_path, form, case, folder):
    for number, words in enumerate(WORDS.values()):
        images = [picture(20 * number + i) for i in range(10)]
        plain(tmp_path / folder / form.format(words[case]), images, STRUCT, label=["a", "b"] * 5)
    for name in ("README.md", "notes.txt", "train.csv", "cover.png"):  # beside them, as on the hub
        (tmp_path / folder / name).write_text("x")
    dataset = load(tmp_path / folder)
    assert dataset.train[0].example_id.startswith("train/") and len(dataset.pool) == 10
    assert {e.example_id.split("/")[0] for e in (*dataset.validation, *dataset.test)} == {"test"}


def test_parquet_files_of_no_split_are_all_to_learn_from_and_others_beside_splits_are_named(tmp_path):
    for number, name in enumerate(("x-0001", "x-0002")):
        plain(
            tmp_path / "set" / f"{name}.parquet",
            [picture(20 * number + i) for i in range(10)],
            STRUCT,
            label=["a", "b"] * 5,
        )
    assert len(load(tmp_path / "set").pool) == 20 - 3
    plain(tmp_path / "set/train.parquet", [picture(90 + i) for i in range(10)], STRUCT, label=["a", "b"] * 5)
    dataset = load(tmp_path / "set")
    assert len(dataset.pool) == 10 - 3
    assert dataset.notes() == ["splits that are not used: x (data.splits names those to use)"]
    assert len(load(tmp_path / "set", splits={"train": "x"}).pool) == 20 - 3
