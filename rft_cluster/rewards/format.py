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
THINK_TAGS = ("<think>", "</think>")
ANSWER_TAGS = ("<answer>", "</answer>")


def format_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the whole text has the layout that the prompt asks for, else 0.0.

    No text is allowed before, between or after the blocks, not even white space at the ends: the token after
    `</answer>` must be the stop token. The content of the blocks, even if empty, is left to other rewards.
    """
    text, thinking = completion.text, asks_for_thinking(prompt.text)
    once = all(text.count(tag) == 1 for tag in ANSWER_TAGS)
    once = once and all(text.count(tag) == int(thinking) for tag in THINK_TAGS)
    return 1.0 if once and (THINK_ANSWER if thinking else ANSWER_ONLY).fullmatch(text) else 0.0
