import logging
import warnings
from pathlib import Path
from random import Random
from threading import Thread

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, get_data_path, rcParams
from PIL import Image
from some_prompt import some_prompt

from rft_cluster.classification.answers import AnswerReader, Vote
from rft_cluster.classification.fonts import families_for
from rft_cluster.classification.plots import draw_evaluation, draw_sweep, evaluation_figure, fonts_for
from rft_cluster.classification.report import judge, report
from rft_cluster.messages import Completion, Group


def figures(classes: list[str]) -> dict:
    reader = AnswerReader(classes, {})
    judged = [
        judge(
            Group(
                some_prompt(f"test/0/{i}", f"{i}.png", b"", "?", label, 0),
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


SCRIPTS = {
    "Han": "\u8594\u8587",
    "Hangul": "\uc7a5\ubbf8",
    "Hiragana": "\u3070\u3089",
    "Devanagari": "\u0917\u0941\u0932\u093e\u092c",
    "Thai": "\u0e01\u0e38",
    "emoji": "\U0001f339",
    "cuneiform": "\U00012000",
    "Tamil": "\u0bb0\u0bcb\u0b9c\u0bbe",
}
USUAL = [
    "rose",
    "$5 - $10",
    'O\'Brien "x"',
    "=SUM(A1)",
    "<5mm",
    "a\\b",
    "$x^2$",
    "\u00e9\u00e8",
    "\u0440\u043e\u0437\u0430",
    "a\u200db\ufe0f",
]


def font_with(characters: str, path: Path) -> Path:
    """A font file that has a square for each of the characters."""
    names = [f"g{ord(c)}" for c in characters]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names, strict=True)})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys([".notdef", *names], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (800, 50)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=500)
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def warned():
    """The records that matplotlib logs during the test: `make unit` switches pytest's own capture off."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("matplotlib").addHandler(handler)
    yield records
    logging.getLogger("matplotlib").removeHandler(handler)


@pytest.fixture
def fonts(monkeypatch):
    """No fonts but matplotlib's own; returns a list of files that are \"installed\"."""
    installed: list[str] = []
    own = [entry for entry in font_manager.fontManager.ttflist if get_data_path() in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: installed)
    return installed


def drawn(classes: list[str], path: Path, title: str = "title") -> tuple[list[str], list[str]]:
    """The class names and the legend of a picture that was drawn without a warning."""
    shown = figures(classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_evaluation(shown, title, path)
    missing = families_for([title, *classes])[1]
    figure = evaluation_figure(shown, title, missing)
    legend = [text.get_text() for box in figure.legends for text in box.get_texts()]
    return [label.get_text() for label in figure.axes[0].get_yticklabels()], legend


@pytest.mark.parametrize("seed", range(3))
def test_names_without_a_font_are_numbers_with_a_legend(fonts, tmp_path, seed, warned, capfd):
    rng = Random(seed)
    classes = [*rng.sample(USUAL, 4), *(f"{text} ({name})" for name, text in rng.sample(sorted(SCRIPTS.items()), 3))]
    rng.shuffle(classes)
    names, legend = drawn(classes, tmp_path / "e.png", title="\u8594 flowers")
    for number, (label, name) in enumerate(zip(classes, names, strict=True), 1):
        script = next((text for text in SCRIPTS.values() if text in label), None)
        if script is None:
            assert name == label.replace("\u200d", "").replace("\ufe0f", "")
            continue
        assert name == str(number)
        (line,) = [line for line in legend if line.startswith(f"{number}: ")]
        assert all(f"U+{ord(c):04X}" in line for c in script) and line.endswith(label[-3:])
    assert len(legend) == 3
    assert not warned and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("first", "second"), [(name, ("Han", "emoji")[i % 2]) for i, name in enumerate(sorted(SCRIPTS))]
)
def test_fonts_that_are_installed_are_found_and_used(fonts, tmp_path, first, second, warned):
    for name in {first, second}:
        fonts.append(str(font_with(SCRIPTS[name], tmp_path / f"font{name}.ttf")))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    fonts.append(str(tmp_path / "broken.ttf"))
    classes = ["rose", SCRIPTS[first], f"{SCRIPTS[second]} {SCRIPTS[first]}"]
    assert drawn(classes, tmp_path / "e.png") == (classes, [])
    assert not warned


def test_the_matrix_has_its_numbers(tmp_path):
    shown = figures(["a", "b", "c"])
    texts = [text.get_text() for text in evaluation_figure(shown, "title", set()).axes[0].texts]
    assert texts == ["1", "1", "1"]  # all were answered a
    assert evaluation_figure(figures([f"{i}" for i in range(41)]), "title", set()).axes[0].texts[:] == []


def test_a_sweep_over_names_in_any_script(fonts, tmp_path):
    rate = {"rate": 0.5, "interval": None, "range": [0.4, 0.6], "rates": [0.4, 0.5, 0.6], "against": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_sweep({text: [(text, rate)] for text in SCRIPTS.values()}, "prompt.subject", tmp_path / "sweep.png")


def test_hundreds_of_classes_still_fit(tmp_path):
    draw_evaluation(figures([f"class {i}" for i in range(300)]), "many", tmp_path / "many.png")
    assert max(Image.open(tmp_path / "many.png").size) < 3000


def test_a_sweep_of_words_and_numbers(tmp_path):
    rate = {"rate": 0.5, "interval": [0.4, 0.6], "range": [0.5, 0.5], "rates": [0.5], "against": None}
    draw_sweep({"a": [(1, rate), (2, rate)], "b $": [("all", rate)]}, "data.shots", tmp_path / "sweep.png")
    width, height = Image.open(tmp_path / "sweep.png").size
    assert width > 500
    against = {"differences": [-0.1, 0.2], "median": 0.05}
    draw_sweep({"a": [(1, rate), (2, rate | {"against": against})]}, "data.shots", tmp_path / "paired.png")
    assert Image.open(tmp_path / "paired.png").size[1] > height


def test_two_threads_that_draw_do_not_change_each_other_s_settings():
    seen = []

    def draw() -> None:
        with fonts_for(["b"]):
            seen.append(rcParams["text.parse_math"])

    other = Thread(target=draw)
    with fonts_for(["a"]):
        other.start()
        other.join(0.1)  # it waits, or would have seen this thread's settings and put them back
        assert seen == []
    other.join()
    assert seen == [False] and rcParams["text.parse_math"]
