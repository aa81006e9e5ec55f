"""Text of data and models, made safe to print."""

import csv
import io
import unicodedata
from collections.abc import Iterable
from typing import Any

# Zero-width (non-)joiners: scripts and emoji need them, and they steer nothing.
JOINERS = "\u200c\u200d"

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def printable(text: str) -> str:
    """The text on one line, without what could steer a terminal or turn its direction: such characters become `?`."""
    one_line = " ".join(text.split())
    return "".join("?" if unicodedata.category(c)[0] == "C" and c not in JOINERS else c for c in one_line)


def shown(text: str) -> str:
    """`text` with control characters and the like written as in Python, so that a file name cannot steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def csv_line(values: Iterable[Any]) -> str:
    """A row of a CSV file, with its line end. What a model or a file's name says could be a formula to a spreadsheet:
    an apostrophe goes in front."""
    file = io.StringIO()
    safe = (f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value for value in values)
    csv.writer(file, lineterminator="\n").writerow(safe)
    return file.getvalue()
