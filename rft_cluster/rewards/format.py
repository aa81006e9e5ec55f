"""Format reward: has the completion the layout that its prompt asks for, and nothing else?

What the prompt shows decides, for a template may ask for the answer alone:

| the prompt's text shows | the whole completion must be |
|---|---|
| `<think>` | a think block, optional white space, an answer block |
| `<answer>` but no `<think>` | an answer block |
| neither (a weak prompt) | a think block, optional white space, an answer block |

The first layout is Visual-RFT's (arXiv 2503.01785), with one departure: there `.*?` may run over further tags, so a
completion that opens several answer blocks still passes; here each tag of the layout occurs once, and no other.
"""

import re

from rft_cluster.messages import Completion, Prompt
from rft_cluster.prompts import asks_for_thinking

THINK_ANSWER = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
ANSWER_ONLY = re.compile(r"<answer>.*</answer>", re.DOTALL)
THINK_TAGS = ("<think>", "</think>")
ANSWER_TAGS = ("<answer>", "</answer>")


def format_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the whole text has the layout that the prompt asks for; otherwise 0.0.

    Nothing may stand before, between or after the blocks, white space at either end included: the policy's
    next token after `</answer>` is to be the stop token. What the blocks say, even nothing, is left to other
    rewards.
    """
    text, thinking = completion.text, asks_for_thinking(prompt.text)
    once = all(text.count(tag) == 1 for tag in ANSWER_TAGS)
    once = once and all(text.count(tag) == int(thinking) for tag in THINK_TAGS)
    return 1.0 if once and (THINK_ANSWER if thinking else ANSWER_ONLY).fullmatch(text) else 0.0
