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
    orders = [["tulip", "iris", "rose"], ["rose", "tulip", "iris"]]
    right, other = answers(*LABELS), answers("rose", "rose", None, "rose")
    found = over_orders(orders, [right, other])
    assert (found["strict"], found["mean"], found["same"]) == ([1.0, 0.5], 0.75, 0.5)
    assert found["deviation"] == pytest.approx(0.5**0.5 / 2)  # of two: their difference by the root of 2
    # First listed: tulip, answered once in 4 and shown by 1; rose, answered by 3 of 4 and shown by 2.
    assert found["first"] == {"answers": 4 / 8, "images": 3 / 8}
    # Last listed: rose, answered twice and shown by 2; iris, never answered and shown by 1.
    assert found["last"] == {"answers": 2 / 8, "images": 3 / 8}
    assert order_lines(found) == [
        "other orders: 2     75.0 %   50.0 to 100.0, deviation 35.4: greedy, strict, with the classes listed in other "
        "orders",
        "  50.0 % of the images get the same answer in all of them",
        "  the first listed is answered for 50.0 % (and shown by 37.5 %) of the images, the last for 25.0 % (37.5 %)",
    ]


def test_a_policy_that_names_the_first_listed_is_found_out():
    orders = [["tulip", "iris", "rose"], ["rose", "tulip", "iris"], ["iris", "rose", "tulip"]]
    found = over_orders(orders, [answers(*[order[0]] * 4) for order in orders])
    assert (found["first"]["answers"], found["last"]["answers"], found["same"]) == (1.0, 0.0, 0.0)


def test_one_order_has_no_deviation():
    found = over_orders([["rose", "tulip", "iris"]], [answers(*LABELS)])
    assert found["deviation"] is None and "deviation" not in order_lines(found)[0]
