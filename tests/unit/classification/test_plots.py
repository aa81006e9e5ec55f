import numpy as np
from PIL import Image

from rft_cluster.classification.answers import AnswerReader, Vote
from rft_cluster.classification.plots import draw_evaluation, draw_sweep
from rft_cluster.classification.report import judge, report
from rft_cluster.messages import Completion, Group, Prompt


def figures(classes: list[str]) -> dict:
    reader = AnswerReader(classes, {})
    judged = [
        judge(
            Group(
                Prompt(f"test/0/{i}", f"{i}.png", b"", "?", label, 0),
                [1],
                [Completion([1], [0.0], f"<answer>{classes[0]}</answer>", "stop", 0)],
            ),
            reader,
        )
        for i, label in enumerate(classes)
    ]
    return report(
        judged, [Vote(classes[0], 1.0, {}, "")] * len(classes), classes, {f"{i}.png": "" for i in range(len(classes))}
    )


def test_names_that_look_like_markup_are_drawn_and_the_same_figures_give_the_same_bytes(tmp_path):
    shown = figures(["$x^2", r"a\b_{", "<b>bold</b>", "é" * 90])
    for name in ("one.png", "two.png"):
        draw_evaluation(shown, "title $", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert np.asarray(Image.open(tmp_path / "one.png")).std() > 10, "an empty picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_hundreds_of_classes_still_fit(tmp_path):
    draw_evaluation(figures([f"class {i}" for i in range(300)]), "many", tmp_path / "many.png")
    assert max(Image.open(tmp_path / "many.png").size) < 3000


def test_a_sweep_of_words_and_numbers(tmp_path):
    rate = {"rate": 0.5, "interval": [0.4, 0.6]}
    draw_sweep({"a": [(1, rate), (2, rate)], "b $": [("all", rate)]}, "data.shots", tmp_path / "sweep.png")
    assert Image.open(tmp_path / "sweep.png").size[0] > 500
