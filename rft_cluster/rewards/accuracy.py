"""Accuracy reward: the answer must be the label or an alias.

The rule is strict equality. By the original recipe's containment rule, an empty answer, a single letter or a list of
classes is right. Spelling is normalised: `Hard leaved_Pocket orchid.` is `hard-leaved pocket orchid`.
"""

from rft_cluster.common.labels import extract_answer, normalise_label
from rft_cluster.messages import Completion, Prompt


def accuracy_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the text has exactly one answer block with the label or an alias, else 0.0.

    Answer and names are compared after `normalise_label`.

    Raises:
        ValueError: a name normalises to an empty text, so that an empty answer would be right.
    """
    names = {normalise_label(name): name for name in (prompt.label, *prompt.aliases)}
    if "" in names:
        raise ValueError(f"label {names['']!r} of {prompt.example_id} has no letter, digit or symbol")
    answer = extract_answer(completion.text)
    return 1.0 if answer is not None and normalise_label(answer) in names else 0.0
