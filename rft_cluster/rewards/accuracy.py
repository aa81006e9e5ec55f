"""Accuracy reward: is the answer the label, or another name of it?

Strict equality, unlike the containment rule of the original recipe, by which an empty answer, a single letter
or a list of classes was right. Writing does not count: `Hard leaved_Pocket orchid.` is `hard-leaved pocket
orchid`.
"""

import re
import unicodedata

from rft_cluster.messages import Completion, Prompt

ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
# First letters of the Unicode categories that carry no meaning in a label: punctuation (with hyphen and
# underscore), separators, control and zero-width characters. Symbols stay: C++ is not C.
IGNORED_CATEGORIES = "PZC"


def accuracy_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the text has exactly one answer block and it holds the label or one of its aliases.

    Answer and names are compared as `normalise_label` sees them.

    Raises:
        ValueError: a name normalises to nothing, so that no answer could be told from an empty one.
    """
    names = {normalise_label(name): name for name in (prompt.label, *prompt.aliases)}
    if "" in names:
        raise ValueError(f"label {names['']!r} of {prompt.example_id} has no letter, digit or symbol")
    answer = extract_answer(completion.text)
    return 1.0 if answer is not None and normalise_label(answer) in names else 0.0


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
