import pytest

from rft_cluster.classification.orders import order_lines, over_orders
from rft_cluster.classification.report import Judged

LABELS = ["rose", "tulip", "iris", "rose"]


def answers(*predicted: str | None) -> list[Judged]:
    return [
        Judged(f"photos/{i}", label, "", said, said == label, said == label, True)
        for i, (label, said) in enumerate(zip(LABELS, predicted, strict=True))
    ]


def test_the_spread_over_orders_by_hand():
    classes, orders = ["iris", "rose", "tulip"], [["tulip", "iris", "rose"], ["rose", "tulip", "iris"]]
    own, right, other = (
        answers("iris", "tulip", "iris", "rose"),
        answers(*LABELS),
        answers("rose", "rose", None, "rose"),
    )
    found = over_orders(classes, own, orders, [right, other])
    assert (found["strict"], found["mean"], found["same"]) == ([1.0, 0.5], 0.75, 0.25)
    assert found["deviation"] == pytest.approx(0.5**0.5 / 2)  # of two: their difference by the root of 2
    # First listed: iris, answered twice in 4 and shown by 1; tulip, once and shown by 1; rose, 3 times and shown by 2.
    assert found["first"] == {"answers": 6 / 12, "images": 4 / 12}
    # Last listed: tulip, answered once and shown by 1; rose, twice and shown by 2; iris, never and shown by 1.
    assert found["last"] == {"answers": 3 / 12, "images": 4 / 12}
    assert order_lines(found) == [
        "other orders: 2     75.0 %   50.0 to 100.0, deviation 35.4: greedy, strict, with the classes listed in other "
        "orders: mean, lowest to highest",
        "  25.0 % of the images get the same answer in all orders",
        "  the first listed is answered for 50.0 % (and shown by 33.3 %) of the images, the last for 25.0 % (33.3 %)",
    ]


def test_a_policy_that_names_the_first_listed_is_found_out():
    own, *orders = [["tulip", "iris", "rose"], ["rose", "tulip", "iris"], ["iris", "rose", "tulip"]]
    first, *others = [answers(*[order[0]] * 4) for order in (own, *orders)]
    found = over_orders(own, first, orders, others)
    assert (found["first"]["answers"], found["last"]["answers"], found["same"]) == (1.0, 0.0, 0.0)


def test_two_classes_have_one_other_order_and_it_is_compared_with_their_own():
    first, second = (answers("rose", "rose", "rose", "rose"), answers("tulip", "tulip", "tulip", "tulip"))
    found = over_orders(["rose", "tulip"], first, [["tulip", "rose"]], [second])
    assert (found["same"], found["first"]["answers"]) == (0.0, 1.0)


def test_one_order_has_no_deviation():
    found = over_orders(["iris", "rose", "tulip"], answers(*LABELS), [["rose", "tulip", "iris"]], [answers(*LABELS)])
    assert found["deviation"] is None and "deviation" not in order_lines(found)[0]
