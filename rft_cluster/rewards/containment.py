"""The published accuracy rule of Visual-RFT (arXiv 2503.01785), only for comparison with published figures.

White space at the ends, spaces and underscores are removed from answer and label, and both are lowercased. The answer
is right if either contains the other. The answer is the first answer block that opens and closes on one line, or the
whole completion if there is none. (The original first compares both as formulas, with math_verify. That is left out,
because class names are not formulas.)

Do not train on it, because it can be earned without knowing the class:
- an empty answer is right for every class, and so is an empty completion;
- the answer `e` is right for 73 % of the 102 flowers, and a list of all classes for each of them;
- `rose` is right for pink primrose, and `petunia` for mexican petunia;
- a class that the reasoning only mentions is right once the closing tag is missing or the answer has two lines.
It also refuses right answers: `hard leaved pocket orchid` for hard-leaved pocket orchid, because it keeps hyphens.
`accuracy` has none of these.
"""

import re

from rft_cluster.messages import Completion, Prompt

ONE_LINE_ANSWER = re.compile(r"<answer>(.*?)</answer>")  # the dot does not match a line end


def containment_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the answer contains the label or the label the answer, else 0.0."""
    answer = _squeezed(published_answer(completion.text))
    label = _squeezed(prompt.label)
    return 1.0 if answer in label or label in answer else 0.0


def published_answer(text: str) -> str:
    """The answer by the published rule, see the module's docstring."""
    match = ONE_LINE_ANSWER.search(text)
    return match.group(1) if match else text


def _squeezed(text: str) -> str:
    return text.strip().replace(" ", "").replace("_", "").lower()
