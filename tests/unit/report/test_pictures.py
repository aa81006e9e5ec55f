from pathlib import Path

import pytest
from PIL import Image

from rft_cluster.config import load_config
from rft_cluster.data import load_dataset
from rft_cluster.prompts import Question
from rft_cluster.report.pictures import find_pictures
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.history import read_history
from rft_cluster.run.task import Task
from rft_cluster.run.thumbnails import FILE, archive, thumbnails, wanted
from tests.unit.report.whole import written

SETTINGS = ("data.source=folder", "data.shots=1", "data.validation=0", "data.test=2", "run.name=mine")


@pytest.fixture
def photos(tmp_path) -> Path:
    for number, name in enumerate(("rose", "tulip")):
        for i in range(3):
            file = tmp_path / "photos" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (100 * number, 60 * i, 7)).save(file)
    return tmp_path / "photos"


@pytest.fixture
def older(photos, tmp_path) -> Path:
    """A run of an earlier version: it kept no thumbnails."""
    config = load_config("digits", [f"run.folder={tmp_path}", f"data.path={photos}", *SETTINGS])
    return RunFolder(config, Task(load_dataset(config.data, 0), Question("Which flower?")), 0).path


def test_a_run_s_own_thumbnails_need_no_data(tmp_path):
    run = written(tmp_path)
    found, missing = find_pictures(read_history(run), [], from_data=False)
    assert (len(found), missing) == (6, "")


def test_an_older_run_s_images_are_found_where_they_were_or_where_they_are_now(older, photos):
    history = read_history(older)
    assert find_pictures(history, [], from_data=False)[1].startswith("4 of 4 images are shown without a picture.")
    assert len(find_pictures(history, [], from_data=True)[0]) == 4
    moved = photos.rename(photos.with_name("moved"))
    found, missing = find_pictures(history, [], from_data=True)
    assert found == {} and "The data set could not be read" in missing and str(photos) in missing
    found, missing = find_pictures(history, [f"data.path={moved}"], from_data=True)
    assert (len(found), missing) == (4, "")


def test_other_images_in_their_place_are_not_shown_for_them(older, photos):
    for file in photos.rglob("*.png"):
        Image.new("RGB", (32, 32), "white").save(file)
    found, missing = find_pictures(read_history(older), [], from_data=True)
    assert found == {} and missing


def test_a_stranger_s_function_is_not_run(older, tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'struck')!r}, 'w')\ndef load(config, seed): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = older / "config.yaml"
    config.write_text(config.read_text().replace("source: folder", "source: strange:load"))
    found, missing = find_pictures(read_history(older), [], from_data=True)
    assert found == {} and "data.source=strange:load" in missing
    assert not (tmp_path / "struck").exists()


def test_a_few_of_many_images_are_said(tmp_path):
    run = written(tmp_path)
    dataset_of = read_history(run).manifest
    first = dataset_of["splits"]["train"][0]["sha256"]
    found, _ = find_pictures(read_history(run), [], from_data=False)
    (run / FILE).write_bytes(archive({first: found[first]}))
    assert find_pictures(read_history(run), [], from_data=True)[1] == "5 of 6 images are shown without a picture."


def test_thumbnails_are_made_in_the_order_of_use(older):
    dataset = load_dataset(load_config(str(older / "config.yaml"), []).data, 0)
    order = wanted(dataset)
    assert order[:2] == [example.image.sha256 for example in dataset.train]
    assert list(thumbnails(order, dataset.images)) == order
