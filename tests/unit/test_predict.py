import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from some_prompt import some_prompt

from rft_cluster import evaluate, predict
from rft_cluster.classification.card import Calibration, Card, read_card
from rft_cluster.classification.predictions import json_line, table_line
from rft_cluster.cluster.gpus import Driver, Gpu
from rft_cluster.common.errors import UserError
from rft_cluster.data.files import LeftOut
from rft_cluster.data.images import Limits
from rft_cluster.data.shown import WHOLE
from rft_cluster.messages import Completion, Group
from rft_cluster.model import computing
from rft_cluster.prompts import Question, make_question, narrowed


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


CLOSED = make_question("closed", "flower", ["rose", "tulip"])
OPEN = make_question("answer_only", "flower", ["rose", "tulip"])
THINKING = make_question("think_answer", "flower", ["rose", "tulip"])


def way(question: Question, *words: str) -> tuple[bool, bool]:
    """(an engine is started, probabilities are computed)."""
    found = predict.way_of(asked(*words), card_of(question))
    return found.writes, found.probabilities


def card_of(
    question: Question, classes: Sequence[str] = ("rose", "tulip"), calibration: Calibration | None = None
) -> Card:
    return Card(
        dataset="flowers", classes=list(classes), aliases={}, prompt=question.text, prompt_sha256=question.sha256,
        template=question.template, subject="flower", min_pixels=784, max_pixels=784, max_prompt_tokens=99,
        max_tokens=9, temperature=1.0, steps=1, calibration=calibration,
    )  # fmt: skip


def asked(*words: str) -> argparse.Namespace:
    """The options of these words."""
    kept: list[argparse.Namespace] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(predict, "predict", lambda options: kept.append(options) or 0)
        assert predict.main(["--checkpoint", "x", "y", *words]) == 0
    return kept[0]


@pytest.mark.parametrize(
    ("question", "words", "expected"),
    [
        (CLOSED, [], (False, True)),
        (CLOSED, ["--votes", "8"], (True, False)),
        (CLOSED, ["--votes", "1"], (True, False)),
        (OPEN, [], (True, False)),
        (OPEN, ["--closed"], (False, True)),
        (OPEN, ["--unsure-below", "0.8"], (False, True)),
        (THINKING, [], (True, False)),
        (THINKING, ["--votes", "8"], (True, False)),
        (THINKING, ["--closed"], (True, True)),
        (THINKING, ["--unsure-below", "0", "--votes", "8"], (True, True)),
    ],
)
def test_an_engine_starts_only_where_something_is_written(question, words, expected):
    assert way(question, *words) == expected


@pytest.mark.parametrize(
    ("question", "words", "expected"),
    [
        (OPEN, ["--second-look", "2"], (False, True, 2)),
        (THINKING, ["--second-look", "2"], (True, False, 2)),
        (THINKING, ["--second-look", "2", "--votes", "4"], (True, False, 2)),
        (CLOSED, ["--second-look", "2"], (False, True, 0)),  # all classes are listed already
    ],
)
def test_a_second_look_is_taken_in_writing_after_reasoning_alone(question, words, expected):
    found = predict.way_of(asked(*words), card_of(question))
    assert (found.writes, found.probabilities, found.options) == expected


def test_a_second_look_in_writing_has_no_probability():
    with pytest.raises(UserError, match="after reasoning, the answer of --second-look is in writing"):
        way(THINKING, "--second-look", "2", "--closed")
    with pytest.raises(UserError, match="--second-look is 1: give it 2 or more options"):
        way(OPEN, "--second-look", "1")


def test_a_second_look_divides_the_probability_of_its_options_anew(tmp_path):
    classes = ["rose", "tulip", "iris"]
    card = card_of(make_question("answer_only", "flower", classes), classes, Calibration(temperature=1.0, images=60))
    asked_again = []

    def score(image: bytes, question: str, before: str, answers: list[str]) -> tuple[np.ndarray, np.ndarray]:
        shares = [0.5, 0.1, 0.4] if question == card.prompt else [0.2, 0.8]
        asked_again.append(question)
        return np.log([[share, 1e-12] for share in shares]).ravel(), np.full(2 * len(shares), 3)

    one = predict._prediction(card, asked("--second-look", "2"), Path("a.png"), b"image", None, score, 2)
    assert asked_again == [card.prompt, narrowed(card.question, "flower", ["rose", "iris"])]
    assert dict(one.answer.probabilities) == pytest.approx({"iris": 0.72, "rose": 0.18, "tulip": 0.1})
    assert (one.label, one.again.options, one.calibrated) == ("iris", ("rose", "iris"), False)


@pytest.mark.parametrize("words", [["--closed"], ["--unsure-below", "0.5"]])
def test_votes_without_reasoning_would_change_no_probability(words):
    with pytest.raises(UserError, match="--votes is 8, but this policy writes no reasoning"):
        way(CLOSED, *words, "--votes", "8")


def test_a_threshold_is_a_probability(capsys):
    assert predict.main(["--checkpoint", "x", "y", "--unsure-below", "80"]) == 2
    assert "--unsure-below is 80" in capsys.readouterr().err


def test_the_most_probable_class_is_at_the_temperature_of_the_card(tmp_path):
    """With a threshold between the probabilities before and after."""
    card = read_card(export_in(tmp_path, {"temperature": 2.0, "images": 60}))
    seen = []

    def score(image: bytes, question: str, before: str, answers: list[str]) -> tuple[np.ndarray, np.ndarray]:
        seen.append((image, question, before, answers))
        return np.log([0.9, 1e-9, 0.1, 1e-9]), np.full(4, 3)

    one = predict._prediction(card, asked("--unsure-below", "0.8"), Path("a.png"), b"image", None, score)
    assert seen == [(b"image", card.prompt, "<answer>", ["rose</answer>", " rose </answer>", "tulip</answer>",
                                                         " tulip </answer>"])]  # fmt: skip
    assert one.answer.probability == pytest.approx(0.75, abs=1e-3) and one.unsure and one.calibrated
    assert one.label == "unsure" and one.vote is None
    unfitted = card.model_copy(update={"calibration": None})
    one = predict._prediction(unfitted, asked("--unsure-below", "0.8"), Path("a.png"), b"image", None, score)
    assert one.label == "rose" and not one.calibrated


def test_after_reasoning_the_probability_is_the_mean_over_the_votes(tmp_path):
    card = read_card(export_in(tmp_path, None))
    texts = ["<think>a</think><answer>rose</answer>", "<think>b</think><answer>rose</answer>", "no answer"]
    group = Group(some_prompt(), [1], [Completion([1], [0.0], text, "stop", 0) for text in texts])

    def score(image: bytes, question: str, before: str, answers: list[str]) -> tuple[np.ndarray, np.ndarray]:
        assert before in ("<think>a</think><answer>", "<think>b</think><answer>")
        rose = 0.9 if "a" in before[:8] else 0.6
        return np.log([rose, 1e-9, 1 - rose, 1e-9]), np.full(4, 3)

    one = predict._prediction(card, asked("--closed", "--votes", "3"), Path("a.png"), b"image", group, score)
    assert one.answer.probability == pytest.approx((0.9 + 0.6 + 0.5) / 3, abs=1e-3)
    assert one.answer.named == pytest.approx(2 / 3, abs=1e-3)
    assert one.vote.counts == {"rose": 2}
    nothing = Group(some_prompt(), [1], [Completion([1], [0.0], "no answer", "stop", 0)])
    one = predict._prediction(card, asked("--closed"), Path("a.png"), b"image", nothing, score)
    assert (one.label, json.loads(json_line(one))["label"]) == ("(no class)", None)
    assert table_line(one).startswith("a.png,,0.5,tulip,")


def export_in(folder: Path, calibration: dict | None) -> Path:
    card = {
        "dataset": "flowers", "classes": ["rose", "tulip"], "aliases": {}, "prompt": CLOSED.text,
        "prompt_sha256": CLOSED.sha256, "template": CLOSED.template, "subject": "flower", "min_pixels": 784,
        "max_pixels": 784, "max_prompt_tokens": 99, "max_tokens": 9, "temperature": 1.0, "steps": 1,
        "calibration": calibration,
    }  # fmt: skip
    (folder / "classifier.json").write_text(json.dumps(card))
    return folder


def test_a_missing_model_is_a_users_mistake(tmp_path, capsys):
    assert predict.main(["--checkpoint", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --checkpoint:")


def test_a_table_holds_no_formula():
    text = evaluate._csv([{"id": "=HYPERLINK(1)", "share": -0.5, "text": 'a,\n"b"'}])
    assert text == 'id,share,text\n\'=HYPERLINK(1),-0.5,"a,\n""b"""\n'


PROBABILITIES = {
    "fitted_on": 60, "temperature": 1.5, "accuracy": {"rate": 0.5, "interval": [0.2, 0.8]},
    "log_loss": {"value": 0.4, "interval": [0.3, 0.5]}, "calibration_error": {"value": 0.02, "interval": [0.01, 0.04]},
    "coverage": {"accuracy": 0.95, "value": 0.75, "interval": [0.5, 0.8], "threshold": 0.83277, "below": 0.8},
}  # fmt: skip


@pytest.mark.parametrize(
    ("split", "name", "images", "said"),
    [
        ("test", "model-best", 200, ""),
        ("validation", "model", None, ""),
        ("validation", None, 200, ""),  # of other images, or the untouched model
        ("validation", "model", 200, "its temperature was fitted on"),
        ("validation", "model-best", 200, "this policy was chosen and its temperature was fitted on"),
    ],
)
def test_figures_of_the_images_that_something_was_chosen_by_are_said_to_flatter(split, name, images, said):
    figures = {"probabilities": {"fitted_on": images}}
    options = SimpleNamespace(config=None, split=split)
    line = evaluate._in_sample(figures, options, name and Path("runs/a") / name)
    assert line == (f"{said} these images, so figures flatter: --split test judges" if said else "")
    assert not evaluate._in_sample(figures, SimpleNamespace(config="other", split=split), Path("runs/a/model-best"))


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
        "verdict": "verdict: use that", "probabilities": PROBABILITIES,
    }  # fmt: skip
    lines = evaluate._summary(figures).splitlines()
    assert "greedy, strict      75.0 %   30.0 to 95.0" in lines
    assert "1-nearest neighbour on pixels           50.0 %   greedy is -5.0 points (-10.0 to +1.0)" in lines
    assert "linear probe on vision features         82.5 %   greedy is -5.0 points (-10.0 to +1.0)" in lines
    assert "verdict: use that" in lines
    assert (
        "probabilities: log-loss 0.40 (0.30 to 0.50), calibration error 2.0 (1.0 to 4.0) %; temperature 1.5, fitted on "
        "60 validation images"
    ) in lines
    assert any("predict --unsure-below 0.832, " in line for line in lines)
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


@pytest.mark.parametrize(
    ("free", "alone", "sharing"),
    [(29, 0.85, 0.6), (21, 0.68, 0.6), (15, 0.48, 0.4), (1, 0.02, 0.02)],  # GiB of 30; the scorer needs 3
)
def test_the_engine_takes_no_more_of_a_gpu_than_others_leave(monkeypatch, free, alone, sharing):
    monkeypatch.setattr(computing, "free_memory", lambda: (free * 2**30, 30 * 2**30))
    assert [predict._share_of_gpu(probabilities) for probabilities in (False, True)] == [alone, sharing]


OLD = Driver("570.1", 12080, [Gpu("a card", (9, 0), 80 * 10**9)])
TWO = Driver("580.1", 13000, [Gpu("a card", (9, 0), 80 * 10**9), Gpu("of a screen", (6, 1), 2 * 10**9)])


@pytest.mark.parametrize(
    ("built", "driver", "engine", "refused"),
    [
        (True, OLD, False, "which runs CUDA up to 12.8"),  # torch would take the GPU for none, and be slow
        (True, None, True, "has no NVIDIA driver"),
        (True, None, False, ""),  # the classes' probabilities can be computed on a CPU
        (False, OLD, True, ""),  # the packages are those for CPUs
        (True, TWO, False, ""),
        (True, replace(TWO, gpus=TWO.gpus[1:]), False, "has a of a screen of compute capability 6.1"),
        (True, replace(TWO, gpus=[]), True, "have one for GPUs alone"),
    ],
)
def test_packages_for_gpus_need_a_driver_that_can_run_them(monkeypatch, built, driver, engine, refused):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(computing, "device_here", lambda: "cpu")
    monkeypatch.setattr(computing, "is_built_for_gpus", lambda: built)
    monkeypatch.setattr(predict, "driver_here", lambda: driver)
    if not refused:
        assert predict._device(engine) == "cpu"
        return
    with pytest.raises(UserError, match=refused):
        predict._device(engine)


def test_a_gpu_that_the_user_hides_is_not_asked_for_its_driver(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(computing, "is_built_for_gpus", lambda: True)
    monkeypatch.setattr(computing, "device_here", lambda: "cpu")
    monkeypatch.setattr(predict, "driver_here", lambda: OLD)
    assert predict._device(engine=False) == "cpu"
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        predict._device(engine=True)
