"""When are two labels the same answer?"""

import re
import unicodedata

ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
# First letters of the Unicode categories that carry no meaning in a label: punctuation (with hyphen and
# underscore), separators, control and zero-width characters. Symbols stay: C++ is not C.
IGNORED_CATEGORIES = "PZC"


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

    Caseless matching as the Unicode standard defines it (section 3.13, D146): NFKC, case folding, NFKC.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in folded if unicodedata.category(c)[0] not in IGNORED_CATEGORIES)
