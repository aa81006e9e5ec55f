"""From a completion's text to a class, and from several completions to a vote."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rft_cluster.common.labels import extract_answer, normalise_label

THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Vote:
    """`label` has the most votes (None: no completion named a class), `share` of all completions, 0 to 1.

    `counts` are the votes by label; `reasoning` is that of the first completion that said `label`.
    """

    label: str | None
    share: float
    counts: dict[str, int]
    reasoning: str


class AnswerReader:
    """Knows the classes and their aliases; reads answers as strictly as the `accuracy` reward does."""

    def __init__(self, classes: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> None:
        self._label = {normalise_label(label): label for label in classes}
        self._label |= {normalise_label(name): label for label, names in aliases.items() for name in names}

    def label(self, text: str) -> str | None:
        """The class in the text's one answer block; None if there is no such block, or no such class."""
        answer = extract_answer(text)
        return None if answer is None else self._label.get(normalise_label(answer))

    def vote(self, texts: Sequence[str]) -> Vote:
        """The class that most texts answer; of equally many the one answered first.

        Raises:
            ValueError: there are no texts.
        """
        if not texts:
            raise ValueError("a vote needs at least one completion")
        labels = [self.label(text) for text in texts]
        counts = Counter(label for label in labels if label is not None)
        if not counts:
            return Vote(None, 0.0, {}, reasoning(texts[0]))
        label, votes = counts.most_common(1)[0]  # in order of first occurrence where votes are equal
        return Vote(label, votes / len(texts), dict(counts), reasoning(texts[labels.index(label)]))


def reasoning(text: str) -> str:
    """What stands in the first think block, without white space around it; empty where there is none."""
    match = THINK.search(text)
    return match.group(1).strip() if match else ""
