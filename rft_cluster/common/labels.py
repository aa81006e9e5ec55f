"""Compare labels: extract the answer from a text, and normalise it."""

import re
import unicodedata
from functools import lru_cache

ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
# First letters of the Unicode categories that are ignored in a label: punctuation (with hyphen and underscore),
# separators, control and zero-width characters. Symbols stay: C++ is not C.
IGNORED_CATEGORIES = "PZC"
# Exceptions. Unicode punctuation that is part of a name: C# is not C, 5 % is not 5, R&B is not RB. And the back-tick,
# a Unicode symbol, but a quotation mark in answers.
KEPT, QUOTES = "#%&\u2030", "`"
# Variants of one sign: dashes and hyphens, and the slash of fractions.
SAME = {ord(sign): "-" for sign in "\u2010\u2012\u2013\u2014\u2015\ufe58"} | {ord("\u2044"): "/"}
MINUS = "\u2212"  # a Unicode symbol, so it survives a second normalisation
# Signs that are part of a number: between two digits (1.5, 10:30, 20-30, 1/2), and a leading minus or point (-1, .5).
# A hyphen after a letter is not a minus: F-16 is F 16.
OF_A_NUMBER = re.compile(r"(?<=\d)\s*(?P<inner>[^\w\s`])\s*(?=[-\u2212.]?\d)|(?<![^\W_]|\.)(?P<first>[-.])(?=\.?\d)")


def extract_answer(text: str) -> str | None:
    """The unchanged text of the answer block; None unless there is exactly one closed block.

    An unclosed block is not an answer: searching the rest of the text would reward labels named in the reasoning.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = ANSWER.search(text)
    return match.group(1) if match else None


@lru_cache(maxsize=1 << 14)  # a reward compares each answer with the same labels, again and again
def normalise_label(text: str) -> str:
    """The text without case, white space, hyphens, underscores, other punctuation and invisible characters.

    Signs in `KEPT`, and signs that change a number (`OF_A_NUMBER`), stay. Case is folded as the Unicode standard
    defines caseless matching (section 3.13, D146): NFKC, case folding, NFKC.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(SAME)
    written = {}  # position -> the sign to keep there
    for match in OF_A_NUMBER.finditer(folded):
        (kind, sign), *_ = ((name, found) for name, found in match.groupdict().items() if found)
        written[match.start(kind)] = MINUS if sign == "-" else "0." if kind == "first" else sign
    return "".join(written.get(place, c if _has_meaning(c) else "") for place, c in enumerate(folded))


def _has_meaning(character: str) -> bool:
    if character in KEPT:
        return True
    return character not in QUOTES and unicodedata.category(character)[0] not in IGNORED_CATEGORIES
