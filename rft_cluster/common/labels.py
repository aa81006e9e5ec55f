"""When are two labels the same answer?"""

import re
import unicodedata

ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
# First letters of the Unicode categories that carry no meaning in a label: punctuation (with hyphen and
# underscore), separators, control and zero-width characters. Symbols stay: C++ is not C.
IGNORED_CATEGORIES = "PZC"
# Punctuation to Unicode, but part of a name: C# is not C, 5 % not 5, R&B not RB. A back-tick is a symbol to Unicode,
# but a quotation mark to who writes an answer.
KEPT, QUOTES = "#%&\u2030", "`"
# One sign for what is written in several ways: dashes and hyphens, and the slash of fractions.
SAME = {ord(sign): "-" for sign in "\u2010\u2012\u2013\u2014\u2015\ufe58"} | {ord("\u2044"): "/"}
MINUS = "\u2212"  # a symbol, so a text keeps it when it is normalised again
# What belongs to a number: a sign between two digits (1.5, 10:30, 20-30, 1/2), and a minus or a point that a number
# begins with (-1, .5). After a letter a hyphen is a hyphen: F-16 is F 16.
OF_A_NUMBER = re.compile(r"(?<=\d)\s*(?P<inner>[^\w\s`])\s*(?=[-\u2212.]?\d)|(?<![^\W_]|\.)(?P<first>[-.])(?=\.?\d)")


def extract_answer(text: str) -> str | None:
    """What stands in the text's answer block, untouched; None if there is not exactly one, or it is open.

    An unclosed block is no answer: searching the rest of the text would reward labels named in the reasoning.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = ANSWER.search(text)
    return match.group(1) if match else None


def normalise_label(text: str) -> str:
    """The text without case, white space, hyphens, underscores, other punctuation and invisible characters.

    What makes a number another number stays (`OF_A_NUMBER`), and so do the signs in `KEPT`. Caseless matching as the
    Unicode standard defines it (section 3.13, D146): NFKC, case folding, NFKC.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(SAME)
    written = {}  # by place: a sign that is kept, as it is written
    for match in OF_A_NUMBER.finditer(folded):
        (kind, sign), *_ = ((name, found) for name, found in match.groupdict().items() if found)
        written[match.start(kind)] = MINUS if sign == "-" else "0." if kind == "first" else sign
    return "".join(written.get(place, c if _has_meaning(c) else "") for place, c in enumerate(folded))


def _has_meaning(character: str) -> bool:
    if character in KEPT:
        return True
    return character not in QUOTES and unicodedata.category(character)[0] not in IGNORED_CATEGORIES
