import math

import pytest
from rich.console import Console

from rft_cluster.watch.curves import Curve, drawn

DOTS = range(0x2801, 0x2900)  # Braille patterns but the empty one


def plotted(curve: Curve, width: int = 60, height: int = 12) -> list[tuple[int, int]]:
    """(column, row) of the characters with a dot, by column."""
    lines = drawn(curve, width, height).splitlines()
    assert len(lines) == height and all(len(line) <= width for line in lines)
    return sorted((column, row) for row, line in enumerate(lines) for column, c in enumerate(line) if ord(c) in DOTS)


def test_a_curve_that_rises_is_drawn_from_below_to_above():
    dots = plotted(Curve("reward", range(1, 101), [math.sqrt(step) for step in range(1, 101)]))
    rows = [row for _, row in dots]
    assert (rows[0], rows[-1]) == (max(rows), min(rows)) and max(rows) - min(rows) >= 6
    assert len({column for column, _ in dots}) > 45, "over the whole width"


def test_its_title_has_the_last_value_and_the_axes_have_numbers():
    text = drawn(Curve("reward", [1, 20, 80], [0.25, 0.5, 1.75]), 60, 12)
    assert text.splitlines()[0].strip() == "reward 1.75"
    for number in ("0.25", "1", "1.75", "80"):
        assert number in text


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 0.0], [1e-9, 1e9], [-1.0, 1.0]])
def test_values_of_any_range_are_drawn(values):
    assert plotted(Curve("reward", range(len(values)), values))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (15, 30), (16, 5), (60, 4)])
def test_without_room_for_axes_the_last_value_is_written(width, height):
    console = Console(width=60, color_system=None)
    options = console.options.update(width=width, height=height)
    lines = console.render_lines(Curve("reward", [1, 2], [0.5, 0.75]), options)
    assert lines


def test_a_terminal_without_these_characters_gets_the_last_value():
    console = Console(width=60, color_system=None)
    options = console.options.update(height=12)
    options.encoding = "ascii"
    lines = console.render_lines(Curve("reward", [1, 2], [0.5, 0.75]), options)
    assert "".join(segment.text for segment in lines[0]).strip() == "reward 0.75"


def test_a_figure_that_no_step_has_says_so():
    console = Console(width=60, color_system=None)
    with console.capture() as captured:
        console.print(Curve("accuracy", [], []))
    assert captured.get() == "accuracy: none yet\n"
