"""Normalisers: the weights of tokens, which define the mean over a step's tokens in the loss.

    completion([2, 4], max_tokens=8)  ->  [1/4, 1/8]      weight of each token in completions of 2 and of 4 tokens

A function gets the lengths in tokens of the step's completions and `sampling.max_tokens`. Masked completions are left
out, those with an advantage of 0 are not. The loss is the sum over all tokens of weight times token loss.
"""

from collections.abc import Sequence


def completion(lengths: Sequence[int], max_tokens: int) -> list[float]:
    """The mean over each completion's tokens, then over completions: all completions weigh the same.

    GRPO, arXiv 2402.03300, equation 3.
    """
    return [1.0 / (length * len(lengths)) if length else 0.0 for length in lengths]


def token(lengths: Sequence[int], max_tokens: int) -> list[float]:
    """The mean over all tokens of the step: long completions weigh more.

    DAPO, arXiv 2503.14476, section 3.3.
    """
    return [1.0 / sum(lengths) if length else 0.0 for length in lengths]


def constant(lengths: Sequence[int], max_tokens: int) -> list[float]:
    """The sum over each completion's tokens divided by `max_tokens`, then the mean over completions.

    Every token has the same weight in every step, so no length is favoured.

    Dr. GRPO, arXiv 2503.20783, section 3.2.
    """
    return [1.0 / (max_tokens * len(lengths)) for _ in lengths]
