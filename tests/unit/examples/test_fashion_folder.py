import gzip
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft_cluster.config import DataSection
from rft_cluster.data import load_dataset

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "examples/fashion_folder.py"))


@pytest.fixture
def source(tmp_path) -> Path:
    """Files of the published form: 80 images whose grey level is their row, of the classes 0 to 9 in turn."""
    folder = tmp_path / "source"
    folder.mkdir()
    images = np.arange(80, dtype=np.uint8)[:, None, None] + np.zeros((80, 28, 28), dtype=np.uint8)
    for name, data in (("images-idx3", images), ("labels-idx1", np.arange(80, dtype=np.uint8) % 10)):
        header = struct.pack(f">HBB{data.ndim}I", 0, 8, data.ndim, *data.shape)
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + data.tobytes()))
    return folder


def run(*arguments: str | Path) -> int:
    return TOOL["main"]([str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*"))}


def test_the_folders_are_a_data_set(source, tmp_path, capsys):
    assert run(tmp_path / "clothes", "--source", source, "--per-class", "6") == 0
    assert capsys.readouterr().out.endswith("clothes: 60 images in 10 folders\n")
    dataset = load_dataset(DataSection(source="folder", path=tmp_path / "clothes", shots=2, validation=20, test=20), 0)
    assert sorted(dataset.classes) == sorted(TOOL["CLASSES"]) and len(dataset.pool) == 20
    for path in (tmp_path / "clothes").glob("*/*.png"):
        image, row = Image.open(path), int(path.stem)
        assert image.size == (56, 56) and image.getextrema() == (row, row)
        assert TOOL["CLASSES"][row % 10] == path.parent.name


def test_the_seed_alone_decides(source, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        assert run(tmp_path / name, "--source", source, "--per-class", "3", "--seed", seed) == 0
    assert content(tmp_path / "one") == content(tmp_path / "again")
    assert content(tmp_path / "one").keys() != content(tmp_path / "other").keys()


def test_mistakes_are_explained(source, tmp_path, capsys):
    def message(*arguments: str | Path) -> str:
        assert run(*arguments) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    missing = message(out, "--source", tmp_path)
    assert "train-images-idx3-ubyte.gz is missing. On Debian: apt-get install dataset-fashion-mnist" in missing
    assert "--per-class is 9: the file has 1 to 8" in message(out, "--source", source, "--per-class", "9")
    assert "--per-class is 0" in message(out, "--source", source, "--per-class", "0")
    assert "is there already" in message(source, "--source", source, "--per-class", "1")
    assert not out.exists()
    labels = source / "train-labels-idx1-ubyte.gz"
    for wrong in (
        b"",
        b"text",
        labels.read_bytes()[:30],
        gzip.compress(b"\0\0\x0d\x01\0\0\0\1\0"),
        gzip.compress(b"x"),
    ):
        labels.write_bytes(wrong)
        assert "is not the published file" in message(out, "--source", source)
