"""A data set from a function of the user's own: what may be wrong with it is told, with their frames alone."""

import io
import itertools

import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import load_dataset

HEAD = """
from rft_cluster.data import FewShotDataset, LabelledImage

def whole(**changes):
    train = [LabelledImage(f"{label}{n}", {image!r}, label) for label in ("a", "b") for n in range(2)]
    values = dict(name="own", classes=["a", "b"], train=train, validation=[], test=[], pool=[]) | changes
    return FewShotDataset.of(**values)

"""
NUMBER = itertools.count()
RAISED = [
    "ValueError('x')",
    "KeyError('x')",
    "FileNotFoundError(2, 'gone', 'x')",
    "ZeroDivisionError()",
    "SystemExit(1)",
]
# What stands for a part of the data set, and the name that the message gives the part.
WRONG = {
    "name=3": "name",
    "classes=('a', 'b')": "classes",
    "classes=['a', 2]": "classes",
    "classes=None": "classes",
    "pool=['a.jpg']": "pool",
}
# What no data set is made of, and how that is said at once.
REFUSED = {
    "train=None": "train must be a list of LabelledImage, not None",
    "train=['a']": r"train must be a list of LabelledImage, not \['a'\]",
    "train=[('a', b'', 'a')]": "train must be a list of LabelledImage",
    "test=[None]": "test must be a list of LabelledImage",
    "validation={}": "validation must be a list of LabelledImage, not {}",
    "train=[LabelledImage(1, b'', 'a')]": "example_id of a LabelledImage must be str, not 1",
    "train=[LabelledImage('a', 'a.jpg', 'a')]": "image of a LabelledImage must be bytes, not 'a.jpg'",
    "test=[LabelledImage('a', None, 'a')]": "image of a LabelledImage must be bytes, not None",
    "train=[LabelledImage('a', b'', 1)]": "label of a LabelledImage must be str, not 1",
}


def load(tmp_path, monkeypatch, body: str):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    name = f"own_source_{next(NUMBER)}"
    (tmp_path / f"{name}.py").write_text(HEAD.replace("{image!r}", repr(image.getvalue())) + body)
    monkeypatch.syspath_prepend(tmp_path)
    return name, load_dataset(DataSection(source=f"{name}:load", shots=2, validation=0, test=0), 0)


@pytest.mark.parametrize("body", ["raise {}", "inner()\n\ndef inner():\n    raise {}", "list(map(fail, [1]))"])
@pytest.mark.parametrize("error", RAISED)
def test_what_it_raises(tmp_path, monkeypatch, body, error):
    text = f"def fail(_):\n    raise {error}\n\ndef load(config, seed):\n    {body.format(error)}\n"
    with pytest.raises(UserError) as caught:
        load(tmp_path, monkeypatch, text)
    message = str(caught.value)
    assert message.startswith("data.source: 'own_source_")
    assert error.split("(")[0] in message.splitlines()[0]
    assert ".py, line " in message.splitlines()[0]
    assert "rft_cluster/data" not in message


@pytest.mark.parametrize("change", WRONG)
def test_what_it_returns(tmp_path, monkeypatch, change):
    with pytest.raises(UserError, match=f"^data.source: own_source_.* returned .*{WRONG[change]}"):
        load(tmp_path, monkeypatch, f"def load(config, seed):\n    return whole({change})\n")


@pytest.mark.parametrize("change", REFUSED)
def test_what_it_makes(tmp_path, monkeypatch, change):
    with pytest.raises(UserError, match=rf"^data.source: 'own_source_.*\.py, line \d+: TypeError: {REFUSED[change]}"):
        load(tmp_path, monkeypatch, f"def load(config, seed):\n    return whole({change})\n")


def test_images_beside_the_data_set_are_refused(tmp_path, monkeypatch):
    """A source written for the version before images were passed by reference."""
    body = """
def load(config, seed):
    made = whole()
    return FewShotDataset("own", ["a", "b"], [LabelledImage("a", b"", "a")], [], [], [], made.images)
"""
    cure = "where Example belongs: make the data set with few_shot_split or FewShotDataset.of"
    with pytest.raises(UserError, match=f"returned LabelledImage.* in train, {cure}"):
        load(tmp_path, monkeypatch, body)


def test_a_right_one_is_taken(tmp_path, monkeypatch):
    _, dataset = load(tmp_path, monkeypatch, "def load(config, seed):\n    return whole()\n")
    assert len(dataset.train) == 4
