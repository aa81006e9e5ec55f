"""Format reward: the completion must have the layout that its prompt asks for, and nothing else.

The tags in the prompt decide, because a template may ask for the answer alone:

| the prompt's text shows | the whole completion must be |
|---|---|
| `<think>` | a think block, optional white space, an answer block |
| `<answer>` but no `<think>` | an answer block |
| neither (a weak prompt) | a think block, optional white space, an answer block |

The first layout is Visual-RFT's (arXiv 2503.01785), with one departure: its `.*?` may run over further tags, so a
completion with several answer blocks still passes. Here each tag of the layout must occur once, and no other tag.
"""

import re

from rft_cluster.messages import Completion, Prompt
from rft_cluster.prompts import asks_for_thinking

THINK_ANSWER = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
ANSWER_ONLY = re.compile(r"<answer>.*</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the whole text has the layout that the prompt asks for, else 0.0.

    No text is allowed before, between or after the blocks, not even white space at the ends: the token after
    `</answer>` must be the stop token. The content of the blocks, even if empty, is left to other rewards.
    """
    return 0.0 if format_problem(prompt, completion) else 1.0


def format_problem(prompt: Prompt, completion: Completion) -> str:
    """What is wrong with the layout, for people, e.g. "no </answer>"; "" if nothing is."""
    text, thinking = completion.text, asks_for_thinking(prompt.text)
    for tag in TAGS:
        count, due = text.count(tag), int(thinking or "answer" in tag)
        if count != due:
            return f"no {tag}" if not count else f"{tag} {count} times" if due else f"{tag} was not asked for"
    layout = THINK_ANSWER if thinking else ANSWER_ONLY
    if layout.fullmatch(text):
        return ""
    places = [text.index(tag) for tag in TAGS if tag in text]
    if places != sorted(places):
        return "tags out of order"
    block = layout.search(text)
    return f"text {'between' if not block else 'before' if block.start() else 'after'} the blocks"
