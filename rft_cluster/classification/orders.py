"""Whether answers depend on the order in which the question lists the classes (pure)."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rft_cluster.classification.intervals import rate_line
from rft_cluster.classification.report import Judged
from rft_cluster.common.text import percent


def over_orders(
    classes: Sequence[str],
    own: Sequence[Judged],
    orders: Sequence[Sequence[str]],
    judged: Sequence[Sequence[Judged]],
) -> dict[str, Any]:
    """The report of the same images asked once in each order.

    Args:
        classes: in the data set's own order.
        own: the images, asked in that order.
        orders: the others, each unlike the data set's own.
        judged: each other order's images, in one sequence for all orders.

    Returns:
        `strict`: each other order's accuracy, `mean` and `deviation` (of a sample; None of one order) of these. `same`:
        share of the images that get the same answer in all orders, the own one too. `first` and `last`: over all
        orders, the shares of answers that name the class at that place of the list, and of images that show it. They
        are alike unless the policy favours the place.
    """
    strict = [statistics.fmean(image.strict for image in images) for images in judged]
    every, asked = [own, *judged], [classes, *orders]
    answers = zip(*([image.predicted for image in images] for images in every), strict=True)
    return {
        "orders": [list(order) for order in orders],
        "strict": strict,
        "mean": statistics.fmean(strict),
        "deviation": statistics.stdev(strict) if len(strict) > 1 else None,
        "same": statistics.fmean(len(set(own)) == 1 for own in answers),
        **{name: _at(place, asked, every) for name, place in (("first", 0), ("last", -1))},
    }


def _at(place: int, orders: Sequence[Sequence[str]], judged: Sequence[Sequence[Judged]]) -> dict[str, float]:
    def share(said: Callable[[Judged], str | None]) -> float:
        pairs = zip(orders, judged, strict=True)
        return statistics.fmean(said(image) == order[place] for order, images in pairs for image in images)

    return {"answers": share(lambda image: image.predicted), "images": share(lambda image: image.label)}


def order_lines(figures: dict[str, Any]) -> list[str]:
    """For people: `over_orders`."""
    strict, first, last = figures["strict"], figures["first"], figures["last"]
    spanned = {"rate": figures["mean"], "interval": (min(strict), max(strict))}
    spread = f", deviation {100 * figures['deviation']:.1f}" if figures["deviation"] is not None else ""
    return [
        f"{rate_line(f'other orders: {len(strict)}', spanned)}{spread}: greedy, strict, "
        "with the classes listed in other orders: mean, lowest to highest",
        f"  {percent(figures['same'])} of the images get the same answer in all orders",
        f"  the first listed is answered for {percent(first['answers'])} (and shown by {percent(first['images'])}) of "
        f"the images, the last for {percent(last['answers'])} ({percent(last['images'])})",
    ]
