import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rft_cluster import evaluate, predict
from rft_cluster.classification.answers import Vote
from rft_cluster.common.errors import UserError
from rft_cluster.data.files import LeftOut
from rft_cluster.data.images import Limits
from rft_cluster.data.shown import WHOLE


def test_files_are_found_below_folders_in_order_and_hidden_ones_are_not(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.webp", ".hidden.png", ".git/x.png", "notes.txt", "b/c/3.tiff"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = [
        str(path.relative_to(tmp_path)) for path in predict.image_files([tmp_path, tmp_path / "notes.txt"], LeftOut())
    ]
    assert found == ["a.webp", "b/1.png", "b/2.JPG", "b/c/3.tiff", "notes.txt"]


def test_a_path_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        list(predict.image_files([tmp_path / "none"], LeftOut()))


def test_unreadable_files_are_kept_for_the_end(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"text")
    (tmp_path / "folder.png").mkdir()
    bad: list[str] = []
    names = ("bad.png", "folder.png", "good.png", "none.png")
    read = list(predict._readable([tmp_path / name for name in names], bad, Limits(), None, WHOLE))
    assert [path.name for path, _, _ in read] == ["good.png"]
    assert [Path(problem.split(":")[0]).name for problem in bad] == ["bad.png", "folder.png", "none.png"]


def test_a_line_for_people_and_one_for_programs():
    vote = Vote("rose", 0.75, {"rose": 6}, "red\x1b[2J\nthorns")
    for votes, how in ((8, "75 %"), (1, "greedy")):
        options = SimpleNamespace(votes=votes, json=False, csv=False)
        assert predict._line(Path("a b.png"), vote, options) == f"a b.png\trose\t{how}\tred?[2J thorns"
    line = json.loads(predict._line(Path("a b.png"), vote, SimpleNamespace(votes=8, json=True, csv=False)))
    assert line == {"file": "a b.png", "label": "rose", "share": 0.75, "counts": {"rose": 6},
                    "reasoning": "red\x1b[2J\nthorns"}  # fmt: skip


@pytest.mark.parametrize("path", ["a.png", "=1+1.png", "a, b.png", 'a "b".png', "薔薇.png", "a\nb.png"])
@pytest.mark.parametrize("label", ["rose", "=SUM(A1)", "-1", "5 mm, new", None])
def test_a_row_for_spreadsheets(path, label):
    vote = Vote(label, 1 / 3, {}, "red,\nthorns")
    line = predict._line(Path(path), vote, SimpleNamespace(votes=8, json=False, csv=True))
    (row,) = csv.reader(io.StringIO(line))
    assert row[2:] == ["0.3333", "red, thorns"]
    for cell, value in zip(row, (path, label or ""), strict=False):
        assert cell in (value, f"'{value}")
        assert not cell.startswith(("=", "-", "+", "@"))


@pytest.mark.parametrize(
    ("labels", "unreadable", "text"),
    [
        ({"bag": 41, "shoe": 38, "(no class)": 2}, 0, "81 images: 41 bag, 38 shoe, 2 (no class)"),
        ({"a": 1, "b": 1}, 3, "2 images: 1 a, 1 b; 3 not classified"),
        ({}, 2, "0 images; 2 not classified"),
        ({f"c{n:02d}": 1 for n in range(30)}, 0, "10 of 10 other classes"),
    ],
)
def test_a_folder_s_summary(labels, unreadable, text):
    assert text in predict._summary(labels, unreadable)


def test_answers_are_greedy_as_in_a_run_s_accuracy(monkeypatch):
    monkeypatch.setattr(predict, "predict", lambda options: options.votes)
    assert predict.main(["--checkpoint", "x", "y"]) == 1
    assert predict.main(["--checkpoint", "x", "y", "--votes", "8"]) == 8


def test_a_missing_model_is_a_users_mistake(tmp_path, capsys):
    assert predict.main(["--checkpoint", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --checkpoint:")


def test_a_table_holds_no_formula():
    text = evaluate._csv([{"id": "=HYPERLINK(1)", "share": -0.5, "text": 'a,\n"b"'}])
    assert text == 'id,share,text\n\'=HYPERLINK(1),-0.5,"a,\n""b"""\n'


def test_the_summary_of_an_evaluation_has_the_baselines():
    less = {"difference": -0.05, "interval": [-0.1, 0.01]}
    rate = {"right": 3, "n": 4, "rate": 0.75, "interval": [0.3, 0.95]}
    figures = {
        "images": 4, "split": "test", "votes": 8, "greedy": {"strict": rate, "lenient": rate, "format": rate},
        "vote": {"strict": rate}, "vote_minus_greedy": {"difference": 0.0, "interval": [-0.2, 0.2]},
        "classes": [{"label": "rose", "taken_for": {"tulip": 1}, **rate}],
        "format_failures": {"count": 0, "examples": []},
        "baselines": {"nearest_neighbour": 0.5, "tower_probe": 0.825},
        "greedy_minus_baselines": {"nearest_neighbour": less, "tower_probe": less},
        "verdict": "verdict: use that",
    }  # fmt: skip
    lines = evaluate._summary(figures).splitlines()
    assert "greedy, strict      75.0 %   30.0 to 95.0" in lines
    assert "1-nearest neighbour on pixels           50.0 %   greedy is -5.0 points (-10.0 to +1.0)" in lines
    assert "linear probe on vision features         82.5 %   greedy is -5.0 points (-10.0 to +1.0)" in lines
    assert "verdict: use that" in lines
    skipped = {"baselines": {"nearest_neighbour": 0.5}, "baselines_skipped": "no room"}
    assert "none on vision features: no room" in evaluate._summary({**figures, **skipped}).splitlines()
    assert "on pixels" not in evaluate._summary({**figures, "baselines": {}})


def test_evaluating_without_a_config_needs_a_run(tmp_path, capsys):
    assert evaluate.main(["--checkpoint", "base"]) == 2
    assert "--config is missing" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", "base", "--config", "digits", "--votes", "0"]) == 2
    assert "--votes is 0" in capsys.readouterr().err


@pytest.mark.parametrize("levels", [(0, 4095), None])
def test_pictures_of_16_bits_are_shown_as_in_training(tmp_path, levels):
    import io

    import numpy as np
    from PIL import Image

    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # 0 to 4095
    Image.fromarray(values).save(tmp_path / "scan.png")
    ((_, _, image),) = predict._readable([tmp_path / "scan.png"], [], Limits(), levels, WHOLE)
    shown = np.asarray(Image.open(io.BytesIO(image)))
    assert (shown[:, :, 0] == np.rint(values.astype(int) * 255 / 4095)).all()


def test_too_large_a_picture_names_no_key_that_predict_has_not(tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(2000))
    bad: list[str] = []
    assert list(predict._readable([tmp_path / "large.png"], bad, Limits(bytes=1000, keys=False), None, WHOLE)) == []
    assert bad == [f"{tmp_path}/large.png: larger than 0.001 MB: save it smaller"]
