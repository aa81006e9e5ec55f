"""A data set from a function of the user's own: what may be wrong with it is told, with their frames alone."""

import io
import itertools

import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import load_dataset

HEAD = """
from rft_cluster.data import Example, FewShotDataset

def whole(**changes):
    train = [Example(f"{label}{n}", {image!r}, label) for label in ("a", "b") for n in range(2)]
    values = dict(name="own", classes=["a", "b"], train=train, validation=[], test=[], pool=[]) | changes
    return FewShotDataset(**values)

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
    "train=None": "train",
    "train=['a']": "train",
    "train=[('a', b'', 'a')]": "train",
    "test=[None]": "test",
    "validation={}": "validation",
    "pool=['a.jpg']": "pool",
    "train=[Example(1, b'', 'a')]": "train.example_id",
    "train=[Example('a', 'a.jpg', 'a')]": "train.image",
    "test=[Example('a', None, 'a')]": "test.image",
    "train=[Example('a', b'', 1)]": "train.label",
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


def test_a_right_one_is_taken(tmp_path, monkeypatch):
    _, dataset = load(tmp_path, monkeypatch, "def load(config, seed):\n    return whole()\n")
    assert len(dataset.train) == 4
