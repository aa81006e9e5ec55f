"""The published accuracy rule of Visual-RFT (arXiv 2503.01785), for comparing with published figures only.

White space at the ends, spaces and underscores are removed from answer and label, and both are lowercased; the
answer is right if either contains the other. The answer is the first answer block that opens and closes on one line,
and where there is none, the whole completion. (The original first compares both as formulas, with math_verify; that
is left out: names of classes are none.)

Do not train on it, for it can be had without knowing the class:
- an empty answer is right for every class, and so is an empty completion;
- the answer `e` is right for 73 % of the 102 flowers, and a list of all classes for each of them;
- `rose` is right for pink primrose, and `petunia` for mexican petunia;
- a class that the reasoning only mentions is right once the closing tag is missing or the answer has two lines.
It also refuses what is right: `hard leaved pocket orchid` for hard-leaved pocket orchid, for it keeps hyphens.
`accuracy` has none of these.
"""

import re

from rft_cluster.messages import Completion, Prompt

ONE_LINE_ANSWER = re.compile(r"<answer>(.*?)</answer>")  # the dot stops at the end of a line


def containment_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if answer and label contain one another in either direction, otherwise 0.0."""
    answer = _squeezed(published_answer(completion.text))
    label = _squeezed(prompt.label)
    return 1.0 if answer in label or label in answer else 0.0


def published_answer(text: str) -> str:
    """What the rule takes for the answer: see the module."""
    match = ONE_LINE_ANSWER.search(text)
    return match.group(1) if match else text


def _squeezed(text: str) -> str:
    return text.strip().replace(" ", "").replace("_", "").lower()
