"""The unlabelled pool of the small model: which images, how large, and what is said of it."""

import io
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.data.lazy import Pool
from rft_cluster.prompts import Question
from rft_cluster.run.task import (
    MAX_POOL,
    Task,
    base_model_path,
    check_words,
    choose_pool,
    pool_images,
    pool_note,
    prepare,
    prepare_also,
)


def encoded(side: int, number: int = 0, file_format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side, side)).save(file, file_format)
    return file.getvalue()


def test_the_pool_is_chosen_before_anything_is_read():
    assert choose_pool(MAX_POOL, 0) == list(range(MAX_POOL))
    chosen = choose_pool(3 * MAX_POOL, 1)
    assert len(set(chosen)) == MAX_POOL and chosen == sorted(chosen) and max(chosen) < 3 * MAX_POOL
    assert chosen == choose_pool(3 * MAX_POOL, 1) != choose_pool(3 * MAX_POOL, 2)


@pytest.mark.parametrize("side", [20, 56, 57, 300, 1500])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_each_image_is_read_when_it_is_needed_and_kept_small(side, file_format):
    read = []

    def file(number: int) -> bytes:
        read.append(number)
        return encoded(side, number, file_format)

    images = pool_images(Pool(range(9), file), [1, 4, 7], 56 * 56)
    assert read == [1, 4, 7]
    assert {image.size for image in images} == {(min(side, 56), min(side, 56))}


@pytest.mark.parametrize("bad", [b"", b"text", encoded(99)[:200], b"\x89PNG\r\n\x1a\n"])
def test_what_cannot_be_read_is_left_out_and_counted(capsys, bad):
    images = pool_images([encoded(60), bad, encoded(60, 1), bad], [0, 1, 2, 3], 3136)
    assert len(images) == 2
    assert capsys.readouterr().out == "left out 2 of 4 unlabelled images, which cannot be read\n"


@pytest.mark.parametrize(("pool", "held_out"), [(10, 500), (39, 500), (39, 0), (40, 500), (1097, 700)])
def test_the_size_of_the_pool_is_said_and_a_small_one_warned_of(pool, held_out):
    examples = [LabelledImage(str(i), b"", "ab"[i % 2]) for i in range(8 + held_out)]
    dataset = FewShotDataset.of("toy", ["a", "b"], examples[:8], [], examples[8:], [b""] * pool)
    config: Config = load_config("digits", [])
    (note,) = pool_note(config, Task(dataset, Question("")))
    assert f"a pool of {pool} unlabelled images" in note
    assert ("it will see little" in note) == (pool < 40)
    assert (f"which hold out {held_out}" in note) == (pool < 40 and held_out > 0)
    other = config.model_copy(update={"model": config.model.model_copy(update={"path": "Qwen/Qwen2-VL-2B-Instruct"})})
    assert pool_note(other, Task(replace(dataset), Question(""))) == []


ALSO = ["evaluation.also.source=digits", "evaluation.also.subject=digit", "evaluation.also.test=30"]


def test_the_other_data_set_has_its_own_images_and_its_own_question():
    config = load_config("digits", [*ALSO, "evaluation.also.only=[one,two]", "prompt.template=closed", "data.test=10"])
    also = prepare_also(config)
    assert also is not None and also.dataset.classes == ["one", "two"] and len(also.dataset.test) == 30
    assert also.dataset.test == prepare_also(config).dataset.test  # the same are drawn
    assert "one\ntwo\n" in also.text and "zero" not in also.text
    task = replace(prepare(config), also=also)
    assert task.images.keys() >= {one.image.sha256 for one in (*task.examples, *also.dataset.test)}
    check_words(task)  # the small model knows these words
    assert prepare_also(load_config("digits", [])) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluation.also.subject=bird"], "another question (set evaluation.also.subject as prompt.subject)"),
        (["data.only=[one,two]", "evaluation.also.only=[one,nine]"], "the class 'nine'"),
    ],
)
def test_words_that_the_small_model_does_not_know_are_refused_rather_than_measured(overrides, said):
    config = load_config("digits", [*ALSO, *overrides, "data.validation=0", "data.test=10"])
    with pytest.raises(
        UserError, match=re.escape(f"of its own question and classes alone, and evaluation.also has {said}: leave")
    ):
        check_words(replace(prepare(config), also=prepare_also(config)))


def test_what_is_wrong_with_it_says_which_data_set_is_meant():
    with pytest.raises(UserError, match=r"^evaluation\.also\.only: 'elven' is none of the classes; .*'seven'"):
        prepare_also(load_config("digits", [*ALSO, "evaluation.also.only=[elven]"]))
    with pytest.raises(UserError) as raised:
        prepare_also(load_config("digits", [*ALSO, "evaluation.also.test=1788"]))
    *_, first, second = str(raised.value).splitlines()  # neither folds nor shots of a data set that is only tested
    assert (first.strip(), second.strip()) == ("add images", "set evaluation.also.test=1787")
    with pytest.raises(UserError, match=r"evaluation\.also: folds is about training"):
        load_config("digits", [*ALSO, "evaluation.also.folds=3"])


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A task whose small model is made at once, in a cache of its own. Returns (built, task)."""
    built = []

    def ensure(cache, **_):
        built.append(cache / "abc")
        (cache / "abc").mkdir(parents=True, exist_ok=True)
        (cache / "abc" / "config.json").write_text("{}")
        return cache / "abc"

    monkeypatch.setattr("rft_cluster.run.task.TINY_CACHE", tmp_path / "home")
    monkeypatch.setattr("rft_cluster.model.tiny.build.ensure_tiny_model", ensure)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    examples = [LabelledImage(str(i), b"", "ab"[i % 2]) for i in range(8)]
    return built, Task(FewShotDataset.of("toy", ["a", "b"], examples, [], [], []), Question(""))


def test_the_small_model_of_a_cluster_s_run_lies_where_all_nodes_see_it(tmp_path, small, monkeypatch):
    built, task = small
    config = load_config("digits", [f"run.folder={tmp_path / 'runs'}"])
    assert base_model_path(config, task) == str(tmp_path / "home/abc")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    beside = tmp_path / "runs/.tiny/abc"
    for _ in range(2):
        assert base_model_path(config, task) == str(beside) and (beside / "config.json").is_file()
    assert [path.name for path in beside.parent.iterdir()] == ["abc"], "nothing half-written is left"
    shutil.rmtree(tmp_path / "home")  # another machine's home
    count = len(built)
    assert base_model_path(config, task, earlier="abc") == str(beside) and len(built) == count


def test_a_small_model_that_is_gone_is_built_again_and_that_is_said(tmp_path, small, capsys):
    built, task = small
    config = load_config("digits", [f"run.folder={tmp_path / 'runs'}"])
    assert base_model_path(config, task, earlier="abc") == str(tmp_path / "home/abc")
    assert "WARNING: the small model that this run started from" in capsys.readouterr().out
    assert base_model_path(config, task, earlier="abc") == str(tmp_path / "home/abc") and len(built) == 1
    assert capsys.readouterr().out == ""
