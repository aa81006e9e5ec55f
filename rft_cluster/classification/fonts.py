"""Choose fonts that can draw names in any script, and replace names that no font can draw by numbers."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

BASE = "DejaVu Sans"  # comes with matplotlib
# These fonts draw a box for every character, so they match anything and show nothing.
NO_FONTS = ("Last Resort", "LastResort", "Adobe Blank")
LABEL_LENGTH = 28


def plain(text: str) -> str:
    """The text on one line, without invisible and control characters, cut to `LABEL_LENGTH`.

    Joiners and variation selectors are removed, too: matplotlib draws character by character.
    """
    one_line = " ".join(text.split())
    seen = "".join(c for c in one_line if unicodedata.category(c)[0] != "C" and not _selects_a_variant(c))
    return seen if len(seen) <= LABEL_LENGTH else seen[: LABEL_LENGTH - 1] + "…"


def families_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Font families that together draw the texts, matplotlib's default first, and the characters that none has."""
    from matplotlib import font_manager  # takes a second to import

    left = {c for text in texts for c in plain(text)} - _characters(font_manager.findfont(BASE))
    families = [BASE]
    fonts = _fonts() if left else {}
    while left:
        name = max(fonts, key=lambda name: len(left & _characters(fonts[name])), default=BASE)
        if name in families or not left & _characters(fonts[name]):
            break
        families.append(name)
        left -= _characters(fonts[name])
    return families, left


def drawable(names: Sequence[str], missing: set[str]) -> tuple[list[str], list[str]]:
    """Replace each name that cannot be drawn by its number, from 1. Returns the names, and a legend of the numbers.

    The legend shows a missing character by its code point.
    """
    shown = [plain(name) for name in names]
    numbered = {i for i, name in enumerate(shown) if not name or missing & set(name)}
    legend = [f"{i + 1}: {escaped(shown[i], missing)}" for i in sorted(numbered)]
    return [str(i + 1) if i in numbered else name for i, name in enumerate(shown)], legend


def escaped(text: str, missing: set[str]) -> str:
    """`text` with the missing characters as U+8594 and the like."""
    return "".join(f"U+{ord(c):04X} " if c in missing else c for c in plain(text)).strip()


def _fonts() -> Mapping[str, str]:
    """The font file of each usable family. Fonts installed after matplotlib wrote its list are added."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    listed = {entry.fname for entry in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in listed and Path(path).name != "NotoColorEmoji.ttf":  # matplotlib excludes this font, too
            try:
                manager.addfont(path)
            except (RuntimeError, OSError):  # from FreeType: the file cannot be read
                continue
    usual = [entry for entry in manager.ttflist if entry.style == "normal" and not entry.name.startswith(NO_FONTS)]
    return {entry.name: entry.fname for entry in sorted(usual, key=lambda entry: (entry.name, entry.fname))}


@cache
def _characters(file: str) -> frozenset[str]:
    """The characters of a scalable font; empty for a bitmap font or an unreadable file."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
    except (RuntimeError, OSError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


def _selects_a_variant(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
