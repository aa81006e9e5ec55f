"""Which groups are asked for, given back and made anew, with a Ray that only notes them."""

from types import SimpleNamespace
from typing import Any

import pytest

from rft_cluster.cluster import reservation
from rft_cluster.cluster.placement import bundles
from rft_cluster.cluster.reservation import reserve
from rft_cluster.common.errors import Taken
from rft_cluster.config import load_config

FOUR = ["learners.count=2", "generators.count=2", "learners.cpus=1"]


class Ray:
    """Places each group for which there is room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 4.0  # CPUs
        self.groups: dict[str, Any] = {}
        self.asked: list[str] = []
        self.now = 0.0
        monkeypatch.setattr(reservation, "placement_group", self._group)
        monkeypatch.setattr(reservation, "placement_group_table", lambda group: {"state": group.state})
        monkeypatch.setattr(reservation, "remove_placement_group", lambda group: self.groups.pop(group.name))
        monkeypatch.setattr(reservation, "ray", SimpleNamespace(available_resources=lambda: {"CPU": self.room}))
        monkeypatch.setattr(reservation, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))

    def _sleep(self, seconds: float) -> None:
        self.now += max(1.0, seconds)

    def _group(self, needs: list[dict[str, float]], strategy: str, name: str) -> Any:
        assert name not in self.asked, "Ray refuses the name of a group that was just given back"
        held = sum(group.cpus for group in self.groups.values() if group.state == "CREATED")
        cpus = sum(need["CPU"] for need in needs)
        state = "CREATED" if held + cpus <= self.room else "PENDING"
        group = SimpleNamespace(name=name, cpus=cpus, state=state, wait=lambda _: group.state == "CREATED")
        self.asked.append(name)
        self.groups[name] = group
        return group


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


def test_learners_have_one_group_and_each_generator_its_own(cluster: Ray):
    config = load_config("digits", FOUR)
    reserved = reserve(config, bundles(config))
    assert [group.name for group in reserved.groups] == [  # type: ignore[attr-defined]
        "rft-digits-learners", "rft-digits-generator-0", "rft-digits-generator-1"
    ]  # fmt: skip
    group, index = reserved.place("learner-1") or (None, None)
    assert group is reserved.groups[0] and index == 1
    assert reserved.place("reward") is None and reserved.is_placed("reward")


def test_generators_choose_first_at_every_other_attempt_and_nothing_stays_of_one_that_failed(cluster: Ray):
    cluster.room = 3.0
    config = load_config("digits", FOUR)
    with pytest.raises(Taken, match="its resources are taken: 3 CPUs"):
        reserve(config, bundles(config))
    assert cluster.groups == {}
    assert [name.partition(".")[0].removeprefix("rft-digits-") for name in cluster.asked[:6]] == [
        "learners", "generator-0", "generator-1", "generator-1", "generator-0", "learners"
    ]  # fmt: skip


def test_a_generator_beyond_the_least_number_gets_its_room_when_there_is_some(cluster: Ray):
    cluster.room = 3.0
    config = load_config("digits", [*FOUR, "generators.min=1"])
    reserved = reserve(config, bundles(config))
    assert [reserved.is_placed(f"generator-{i}") for i in range(2)] == [True, False]
    reserved.renew(["generator-1"])
    assert len(cluster.asked) == 3, "what waits for its first room waits on"


def test_a_group_that_lost_its_node_is_made_anew_and_no_other(cluster: Ray):
    """Ray would look for room without a pause, 150,000 times a second."""
    config = load_config("digits", FOUR)
    reserved = reserve(config, bundles(config))
    reserved.renew(["generator-1"])
    assert len(cluster.asked) == 3, "its process died, and its room is there"
    for group in reserved.groups:
        group.state = "RESCHEDULING"  # type: ignore[attr-defined]
    cluster.room = 0.0
    reserved.renew(["learner-0", "learner-1"])
    assert cluster.asked[3:] == ["rft-digits-learners.2"]
    assert not reserved.is_placed("learner-1")
    reserved.give_back()
    assert cluster.groups == {}
