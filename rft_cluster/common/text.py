"""Make text from data and models safe to print."""

import csv
import io
import unicodedata
from collections.abc import Iterable
from typing import Any

# Zero-width (non-)joiners: scripts and emoji need them, and they are harmless.
JOINERS = "\u200c\u200d"

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that begins with one of these


def percent(share: float, digits: int = 1) -> str:
    """`share`: 0 to 1."""
    return f"{100 * share:.{digits}f} %"


def printable(text: str) -> str:
    """The text on one line. Characters that control a terminal or the direction of text become `?`."""
    one_line = " ".join(text.split())
    return "".join("?" if unicodedata.category(c)[0] == "C" and c not in JOINERS else c for c in one_line)


def shown(text: str) -> str:
    """Escape control characters as in Python, so that a file name cannot control the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown_lines(text: str) -> str:
    """As `shown`, for a message of several lines. Joiners stay, which names of classes may need."""
    return "".join(c if c == "\n" or c in JOINERS else shown(c) for c in text)


def csv_line(values: Iterable[Any]) -> str:
    """One row of a CSV file, with the line end. Text that a spreadsheet would run as a formula gets an apostrophe."""
    file = io.StringIO()
    safe = (f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value for value in values)
    csv.writer(file, lineterminator="\n").writerow(safe)
    return file.getvalue()
