"""Format reward: is the completion exactly one think block followed by exactly one answer block?

The rule is Visual-RFT's (arXiv 2503.01785), with one departure: there `.*?` may run over further tags, so a
completion that opens several answer blocks still passes; here each of the four tags occurs once.
"""

import re

from rft_cluster.messages import Completion, Prompt

LAYOUT = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(prompt: Prompt, completion: Completion) -> float:
    """1.0 if the whole text is a think block, optional white space and an answer block; otherwise 0.0.

    Nothing may stand before, between or after the blocks, white space at either end included: the policy's
    next token after `</answer>` is to be the stop token. What the blocks say, even nothing, is left to other
    rewards.
    """
    text = completion.text
    once = all(text.count(tag) == 1 for tag in TAGS)
    return 1.0 if once and LAYOUT.fullmatch(text) else 0.0
