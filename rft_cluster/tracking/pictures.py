"""Pictures of a group: the image, and beside it the completions with their rewards.

Drawn with Pillow, which takes milliseconds (matplotlib takes a tenth of a second for each).
"""

import io
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from rft_cluster.common.text import printable
from rft_cluster.data.images import open_image

WIDTH, IMAGE, LINE, MARGIN = 900, 176, 18, 8  # pixels
LETTERS = 96  # of a completion; of a longer one the beginning and the end, where the answer is
BEGINNING = 30
MOST_LINES = 16  # completions drawn of a group
PAPER, INK, FAINT, GOOD, BAD = "#ffffff", "#22313f", "#6b7780", "#11702f", "#a3271c"


def draw_group(image: bytes | None, row: Mapping[str, Any]) -> bytes:
    """A group as a PNG. `row`: of `rollouts/`. `image`: encoded; None if it is not at hand.

    Green is a reward above the mean of the group, red one below.
    """
    lines = _lines(row)
    sheet = Image.new("RGB", (WIDTH, max(IMAGE, LINE * (len(lines) + 1)) + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    if image is not None:
        picture = ImageOps.contain(open_image(image, pixels=IMAGE * IMAGE), (IMAGE, IMAGE))
        sheet.paste(picture, (MARGIN, MARGIN))
    left = IMAGE + 3 * MARGIN
    title = f"{printable(row['label'])}   {printable(row['example_id'])}"
    draw.text((left, MARGIN), title[:LETTERS], INK, _font())
    for number, (text, colour) in enumerate(lines, 1):
        draw.text((left, MARGIN + number * LINE), text, colour, _font())
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _lines(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The text and colour of each completion's line."""
    totals = [reward["total"] for reward in row["rewards"]]
    known = [total for total in totals if total is not None]
    mean = sum(known) / max(1, len(known))
    more = len(totals) - MOST_LINES
    drawn = MOST_LINES - 1 if more > 0 else len(totals)
    lines = []
    for total, completion in zip(totals[:drawn], row["completions"][:drawn], strict=True):
        shown = "masked" if total is None else f"{total:6.2f}"
        colour = FAINT if total is None or total == mean else GOOD if total > mean else BAD
        lines.append((f"{shown}  {shortened(printable(completion))}", colour))
    return [*lines, (f"and {more + 1} more", FAINT)] if more > 0 else lines


def shortened(text: str) -> str:
    """At most `LETTERS` letters of a text: its beginning and its end."""
    return text if len(text) <= LETTERS else f"{text[:BEGINNING]} … {text[BEGINNING + 3 - LETTERS :]}"


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which comes with matplotlib and has most alphabets. Other characters are boxes in the picture."""
    package = find_spec("matplotlib")
    assert package is not None and package.origin is not None
    return ImageFont.truetype(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", 13)
