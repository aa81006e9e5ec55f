"""Which snapshots are kept, and which one learners get; the states are only named here."""

from dataclasses import dataclass
from typing import Any

import pytest

from rft_cluster.cluster import snapshots
from rft_cluster.cluster.snapshots import Snapshots


@dataclass
class Stored:
    """Stands in for a `StoredSnapshot`."""

    step: int
    status: str = "on its way"
    states: tuple[str, ...] = ("rank 0", "rank 1")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Stored]:
    """All snapshots that were begun."""
    found: list[Stored] = []

    def begin(self: Snapshots, learners: Any, step: int) -> Stored:
        found.append(Stored(step))
        return found[-1]

    monkeypatch.setattr(Snapshots, "_begin", begin)
    return found


def restored(monkeypatch: pytest.MonkeyPatch, works: bool = True) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr(snapshots, "_put_back", lambda learners, snapshot: found.append(snapshot.step) or works)
    return found


TWO, THREE = [None] * 2, [None] * 3  # learners


def test_the_newest_whole_one_counts_and_older_ones_are_dropped(begun):
    kept = Snapshots()
    assert kept.newest() is None
    kept.take(TWO, 1)
    assert kept.newest() is None
    begun[0].status = "whole"
    kept.take(TWO, 2)
    assert kept.newest() == 1, "the second is on its way"
    begun[1].status = "whole"
    assert kept.newest() == 2
    assert kept._taken == [begun[1]]


def test_a_snapshot_that_is_lost_on_its_way_costs_no_older_one(begun):
    kept = Snapshots()
    kept.take(TWO, 1)
    begun[0].status = "whole"
    kept.take(TWO, 2)
    begun[1].status = "lost"
    assert kept.newest() == 1
    kept.take(TWO, 3)
    begun[2].status = "whole"
    assert kept.newest() == 3


def test_no_third_one_is_taken_while_one_is_on_its_way(begun):
    kept = Snapshots()
    for step in (1, 2):
        kept.take(TWO, step)
    assert [one.step for one in begun] == [1]
    begun[0].status = "whole"
    for step in (3, 4, 5):
        kept.take(TWO, step)
    assert [one.step for one in begun] == [1, 3]


def test_learners_get_the_newest_whole_one_and_what_was_on_its_way_is_forgotten(begun, monkeypatch):
    kept, got = Snapshots(), restored(monkeypatch)
    assert kept.restore(TWO) is None
    kept.take(TWO, 1)
    begun[0].status = "whole"
    kept.take(TWO, 2)
    assert kept.restore(TWO) == 1
    assert kept._taken == [begun[0]]
    assert kept.restore(TWO) == 1, "it serves again and again"
    assert got == [1, 1]


@pytest.mark.parametrize(("learners", "works", "asked"), [(THREE, True, []), (TWO, False, [1])])
def test_without_a_usable_one_the_caller_takes_a_checkpoint(begun, monkeypatch, learners, works, asked):
    kept, got = Snapshots(), restored(monkeypatch, works)
    kept.take(TWO, 1)
    begun[0].status = "whole"
    assert kept.restore(learners) is None
    assert got == asked
    assert kept.newest() is None


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("a a", ""), ("a b", "b a"), ("a a b b c", "b b c c a"), ("a b a", "b a b")],
)
def test_the_second_copy_is_on_the_next_of_the_learners_nodes(nodes, expected):
    assert snapshots._next_nodes(nodes.split()) == expected.split()
