"""Rates and their differences, with 95 % intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the rate `right` / `n` (E. B. Wilson, JASA 22, 1927, p. 209).

    Unlike the textbook interval it stays within 0 and 1, and holds for small n and for rates near 0 or 1.
    """
    from scipy.stats import binomtest  # takes a second to import

    interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def sign_flip(differences: Sequence[int]) -> float:
    """The two-sided p of Fisher's exact sign-flip test (The Design of Experiments, 1935, section 21): the share of all
    choices of signs for the differences whose sum is at least as far from 0.

    If two settings are equal, either sign of a pair's difference is as likely; nothing else is assumed. With n
    differences p is at least 2 / 2^n.

    Raises:
        ValueError: there are no differences.
    """
    if not differences:
        raise ValueError("nothing to compare")
    choices = Counter({0: 1})  # of signs, by their sum: whole numbers, so that equal sums are equal
    for difference in differences:
        flipped: Counter[int] = Counter()
        for total, count in choices.items():
            flipped[total + difference] += count
            flipped[total - difference] += count
        choices = flipped
    far = sum(count for total, count in choices.items() if abs(total) >= abs(sum(differences)))
    return far / choices.total()


def rate(flags: Sequence[bool]) -> dict[str, Any]:
    """A rate with its 95 % interval: {"right", "n", "rate", "interval"}."""
    right, n = sum(flags), len(flags)
    return {"right": right, "n": n, "rate": right / n, "interval": list(wilson(right, n))}


def rate_line(name: str, found: Mapping[str, Any]) -> str:
    """A line for people: the name, the rate and its interval, in percent. `found`: see `rate`."""
    low, high = found["interval"]
    return f"{name:<18}{100 * found['rate']:6.1f} %   {100 * low:.1f} to {100 * high:.1f}"


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """The rate of `second` minus the rate of `first` on the same images, with a 95 % interval.

    The interval is Agresti and Min's (Statistics in Medicine 24, 2005, p. 729): half a pair is added to each of the
    four kinds of pairs. `p` is McNemar's exact test: the probability of so uneven a split of the pairs that differ.

    Raises:
        ValueError: the lengths differ, or are 0.
    """
    from scipy.stats import binomtest

    pairs = list(zip(first, second, strict=True))
    if not pairs:
        raise ValueError("nothing to compare")
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    n = len(pairs) + 2
    b, c = only_second + 0.5, only_first + 0.5
    half = 1.959964 * (((b + c) - (b - c) ** 2 / n) ** 0.5) / n
    centre = (b - c) / n
    differ = only_first + only_second
    return {
        "n": len(pairs),
        "only_first": only_first,
        "only_second": only_second,
        "difference": (only_second - only_first) / len(pairs),
        "interval": [max(-1.0, centre - half), min(1.0, centre + half)],
        "p": float(binomtest(only_second, differ).pvalue) if differ else 1.0,
    }
