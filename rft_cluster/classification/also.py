"""What training did to the answers about another data set (`evaluation.also`): what was forgotten (pure)."""

from collections.abc import Sequence

from rft_cluster.classification.intervals import paired_difference, rate
from rft_cluster.classification.report import Judged


def rate_line(name: str, judged: Sequence[Judged]) -> str:
    """The strict accuracy with its interval, for people."""
    own = rate([one.strict for one in judged])
    low, high = (100 * end for end in own["interval"])
    return f"{name}: accuracy {100 * own['rate']:.1f} % (95 % interval {low:.1f} to {high:.1f}, {own['n']} images)"


def change(before: Sequence[Judged], after: Sequence[Judged]) -> str:
    """What became of the answers to the same images, image by image, in a sentence without a stop; empty without both.

    It speaks of forgetting if the whole 95 % interval of the paired difference is below 0.
    """
    if not before or [one.example_id for one in before] != [one.example_id for one in after]:
        return ""
    first, second = ([one.strict for one in side] for side in (before, after))
    less = paired_difference(first, second)
    low, high = less["interval"]
    said = "some was forgotten" if high < 0 else "training helped there, too" if low > 0 else "no clear change"
    return (
        f"on other data accuracy was {100 * sum(first) / len(first):.1f} % before training and is "
        f"{100 * sum(second) / len(second):.1f} % after, image by image {100 * less['difference']:+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f}, {less['n']} images): {said}"
    )
