"""Read a class from a completion's text, and a vote from several completions."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rft_cluster.common.labels import extract_answer, normalise_label

THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Vote:
    """The most frequent answer to an image.

    `label`: the class with the most votes, None if no completion named a class.
    `share`: its votes as a share of all completions, 0 to 1.
    `counts`: the votes by label.
    `reasoning`: the think block of the first completion that answered `label`.
    """

    label: str | None
    share: float
    counts: dict[str, int]
    reasoning: str

    def share_of(self, label: str | None) -> float:
        """The votes for any class as a share of all completions."""
        if label == self.label:
            return self.share
        return self.share * self.counts.get(label, 0) / self.counts[self.label] if label and self.label else 0.0


class AnswerReader:
    """Maps a completion's text to a class, by labels and aliases, as strictly as the `accuracy` reward."""

    def __init__(self, classes: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> None:
        self._label = {normalise_label(label): label for label in classes}
        named = {label: aliases.get(label, ()) for label in classes}  # none of what is no class
        self._label |= {normalise_label(name): label for label, names in named.items() for name in names}

    def label(self, text: str) -> str | None:
        """The class in the text's answer block. None without exactly one block, or if its text is no class."""
        answer = extract_answer(text)
        return None if answer is None else self._label.get(normalise_label(answer))

    def vote(self, texts: Sequence[str]) -> Vote:
        """The most frequent class in the texts. A tie goes to the class that was answered first.

        Raises:
            ValueError: there are no texts.
        """
        if not texts:
            raise ValueError("a vote needs at least one completion")
        labels = [self.label(text) for text in texts]
        counts = Counter(label for label in labels if label is not None)
        if not counts:
            return Vote(None, 0.0, {}, reasoning(texts[0]))
        label, votes = counts.most_common(1)[0]  # ties: in order of first occurrence
        return Vote(label, votes / len(texts), dict(counts), reasoning(texts[labels.index(label)]))


def reasoning(text: str) -> str:
    """The stripped text of the first think block; empty without one."""
    match = THINK.search(text)
    return match.group(1).strip() if match else ""
