"""Accuracy reward: is the answer the label, or another name of it?

Strict equality, unlike the containment rule of the original recipe, by which an empty answer, a single letter
or a list of classes was right. Writing does not count: `Hard leaved_Pocket orchid.` is `hard-leaved pocket
orchid`.
"""

from rft_cluster.common.labels import extract_answer, normalise_label
from rft_cluster.messages import Completion, Prompt


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
