"""Who is replaced by whom, with groups of actors that only have names."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rft_cluster.cluster import recovery
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.recovery import Recovery
from rft_cluster.common.errors import ClusterError, UserError, WeightTransferError
from rft_cluster.config import load_config


class Group:
    """Stands in for an `ActorGroup`; a handle is (name, life)."""

    def __init__(self, *names: str) -> None:
        self.lives = dict.fromkeys(names, 1)
        self.called: list[str] = []
        self.losses = 0

    @property
    def names(self) -> list[str]:
        return list(self.lives)

    @property
    def handles(self) -> list[tuple[str, int]]:
        return list(self.lives.items())

    def __len__(self) -> int:
        return len(self.lives)

    def add(self, name: str, handle: tuple[str, int]) -> None:
        self.lives[name] = handle[1]

    def remove(self, name: str) -> None:
        del self.lives[name]

    def replace(self, handles: dict[str, tuple[str, int]]) -> None:
        self.lives = {name: life for name, (_, life) in handles.items()}

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self.called.append(method)


class Actors:
    """Starts actors that are ready at once, or whenever `ready_names` has them; `fails`: starts that fail."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.lives = {"generator-0": 1, "generator-1": 1, "reward": 1, "learner-0": 1, "learner-1": 1}
        self.ready_names = {*self.lives}
        self.placed = {*self.lives}
        self.fails: list[Exception] = []
        self.failed: set[tuple[str, int]] = set()

    def _start(self, names: Any) -> dict[str, tuple[str, int]]:
        for name in names:
            self.lives[name] += 1
        return {name: (name, self.lives[name]) for name in names}

    grows = True

    def begin(self) -> None:
        pass

    def is_placed(self, name: str) -> bool:
        return name in self.placed

    def left(self) -> float:
        return 60.0

    def start_generators(self, names: Any) -> Any:
        started = self._start(names)
        if self.fails:
            self.failed |= set(started.values())
        return started

    def start_reward(self) -> Any:
        return self._start(["reward"])

    def start_learners(self) -> Any:
        return self._start(["learner-0", "learner-1"])

    def wait_until_ready(self, handles: Any) -> dict[str, str]:
        return {name: f"host of {name}, life {life}" for name, (_, life) in handles.items()}

    def ready(self, asked: Any, enough: int) -> dict[str, str]:
        if any(handle in self.failed for handle in asked):
            raise self.fails.pop(0) if len(self.fails) > 1 else self.fails[0]
        names = [name for name in asked.values() if name in self.ready_names]
        if len(names) < enough:
            raise ClusterError("not ready", asked.values())
        return {name: f"host of {name}" for name in names}


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *overrides: str, again: bool = True) -> None:
        config = load_config("digits", ["generators.count=2", *overrides])
        self.actors, self.asked = Actors(config), list[str]()
        self.generators, self.receivers = Group("generator-0", "generator-1"), Group("generator-0", "generator-1")
        self.reward, self.learners, self.addresses = Group("reward"), Group("learner-0", "learner-1"), dict[str, str]()
        self.weights = SimpleNamespace(
            reconnect=lambda **how: self.events.append(f"reconnect {sorted(how.get('lost', []))}"),
            publish=self._publish,
            wait=self._wait,
        )
        self.events: list[str] = []
        self.breaks: list[Exception] = []
        monkeypatch.setattr(recovery, "ask_addresses", lambda handles: {h: name for name, h in handles.items()})
        monkeypatch.setattr(recovery, "failure", lambda call: call in self.actors.failed)
        self.recovery = Recovery(
            self.actors, self.generators, self.receivers, self.reward, self.learners, self.weights,  # type: ignore[arg-type]
            self.addresses, lambda error, doing: self.asked.append(doing) or again,
        )  # fmt: skip
        self.cluster = Cluster(
            self.generators, self.reward, self.learners, self.weights, config, self.recovery  # type: ignore[arg-type]
        )  # fmt: skip

    def _publish(self, version: int) -> None:
        self.events.append(f"publish {version} to {self.receivers.names}, prompts to {self.generators.names}")
        if self.breaks:
            raise self.breaks.pop(0)

    def _wait(self) -> None:
        self.events.append("wait")
        if self.breaks:
            raise self.breaks.pop(0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


LOST = ClusterError("generator-1 died", ["generator-1"])


def test_who_has_no_room_is_said_once_a_loss(world: World, capsys: pytest.CaptureFixture[str]):
    world.actors.placed.discard("generator-1")
    world.actors.ready_names.discard("generator-1")
    for version in range(1, 7):
        if version in (2, 4):
            world.recovery.replace(LOST)
        world.cluster.broadcast_weights(version)
        if version == 3:  # a node came, and is lost in turn
            world.actors.placed.add("generator-1")
            world.actors.ready_names.add("generator-1")
            world.cluster.broadcast_weights(version)
            world.actors.placed.discard("generator-1")
            world.actors.ready_names.discard("generator-1")
    assert capsys.readouterr().out.count("no node has room for generator-1 now") == 2


def test_a_fresh_generator_gets_prompts_only_when_it_has_been_sent_the_weights(world: World):
    world.cluster.broadcast_weights(3)
    world.actors.ready_names.discard("generator-1")
    world.generators.recover(LOST)
    world.cluster.broadcast_weights(4)
    world.actors.ready_names.add("generator-1")
    world.cluster.broadcast_weights(5)
    assert world.events == [
        "publish 3 to ['generator-0', 'generator-1'], prompts to ['generator-0', 'generator-1']",
        "reconnect ['generator-1']",
        "publish 4 to ['generator-0'], prompts to ['generator-0']",  # nobody waits for the fresh one
        "reconnect []",
        "publish 5 to ['generator-0', 'generator-1'], prompts to ['generator-0']",
    ]
    assert world.generators.lives == world.receivers.lives == {"generator-0": 1, "generator-1": 2}
    assert world.addresses["generator-1"] == "host of generator-1"
    assert world.asked == ["generator-1 starts afresh"]


@pytest.mark.parametrize(("overrides", "waits"), [([], False), (["generators.min=2"], True)])
def test_a_rollout_waits_for_a_fresh_generator_only_if_too_few_are_left(monkeypatch, overrides, waits):
    world = World(monkeypatch, *overrides)
    world.cluster.broadcast_weights(3)
    world.generators.recover(LOST)
    assert ("generator-1" in world.generators.names) is waits
    assert len([event for event in world.events if event.startswith("publish 3")]) == 1 + waits


def test_a_generator_that_dies_in_a_broadcast_is_left_out_and_the_weights_are_sent_again(world: World):
    world.breaks = [LOST]
    world.actors.ready_names.discard("generator-1")
    world.cluster.broadcast_weights(3)
    assert world.events[-1] == "publish 3 to ['generator-0'], prompts to ['generator-0']"


def test_a_generator_that_dies_before_it_has_verified_keeps_no_model_from_being_exported(world: World):
    world.breaks = [LOST]
    world.cluster.export(Path("model"), {})
    assert world.events == ["wait", "reconnect ['generator-1']", "wait"]
    assert world.learners.called == ["export"]
    assert world.learners.lives == {"learner-0": 1, "learner-1": 1}


def test_refused_weights_are_sent_again_and_nobody_is_ended(world: World):
    world.breaks = [WeightTransferError("1 of 2 tensors arrived with other bytes")]
    world.cluster.broadcast_weights(3)
    assert world.events[1:2] == ["reconnect []"]
    assert world.events[0] == world.events[2]
    assert world.asked == ["the weights are sent again"]
    assert world.generators.lives == {"generator-0": 1, "generator-1": 1}


def test_refused_weights_that_a_rollout_meets_are_sent_again_before_it_asks_again(world: World):
    world.cluster.broadcast_weights(3)
    world.generators.recover(WeightTransferError("other bytes"))
    assert len([event for event in world.events if event.startswith("publish 3")]) == 2


def test_a_lost_scorer_is_replaced_and_no_weights_move(world: World):
    world.generators.recover(ClusterError("reward died", ["reward"]))
    assert world.reward.lives == {"reward": 2}
    assert "kill" in world.reward.called, "it may be frozen"
    assert world.events == []


def test_a_reward_actor_that_its_new_node_refuses_is_lost_again(world: World, monkeypatch: pytest.MonkeyPatch):
    def refused(_: object) -> None:
        raise UserError("rewards: my_rewards cannot be imported")

    monkeypatch.setattr(world.actors, "wait_until_ready", refused)
    with pytest.raises(ClusterError, match="my_rewards cannot be imported") as raised:
        world.recovery.replace(ClusterError("reward died", ["reward"]))
    assert raised.value.lost == {"reward"}


@pytest.mark.parametrize(
    ("overrides", "lost", "again"),
    [
        ([], ["learner-0"], True),
        ([], ["generator-1", "learner-0"], True),
        ([], [], True),  # nobody knows who
        ([], ["generator-1"], False),  # used up
        (["cluster.device=cuda", "generators.count=1", "learners.count=1", "generators.gpus=0.4", "learners.gpus=0.6"],
         ["generator-1"], True),
    ],
)  # fmt: skip
def test_what_is_not_replaced_here_is_raised(monkeypatch, overrides, lost, again):
    world = World(monkeypatch, *overrides, again=again)
    error = ClusterError("lost", lost)
    with pytest.raises(ClusterError) as raised:
        world.generators.recover(error)
    assert raised.value is error
    assert world.generators.lives == {"generator-0": 1, "generator-1": 1}


def test_after_the_loss_of_a_learner_all_ranks_are_fresh_and_generators_stay(world: World):
    world.cluster.restart_learners(ClusterError("lost", ["learner-1"]))
    assert world.learners.lives == {"learner-0": 2, "learner-1": 2}
    assert world.learners.called == ["kill", "join"]
    assert world.receivers.called == ["begin_all"], "engines stop writing what nobody waits for"
    assert world.generators.called == ["forget"]
    assert world.generators.lives == {"generator-0": 1, "generator-1": 1}
    assert world.addresses["learner-0"] == "host of learner-0, life 2"
    assert world.events == ["reconnect []"]


def test_a_generator_at_the_other_end_of_a_hanging_transfer_is_replaced_with_the_learners(world: World):
    world.cluster.restart_learners(ClusterError("no answer", ["learner-0", "generator-0"]))
    assert world.generators.lives == {"generator-1": 1}
    assert world.learners.lives == {"learner-0": 2, "learner-1": 2}


def test_learners_that_do_not_find_each_other_are_lost_again(world: World, monkeypatch: pytest.MonkeyPatch):
    """A rank says as an error of the user that a peer did not come: its node went meanwhile."""
    join, refused = world.learners.join, ["learner-1 does not answer: set cluster.interface"]

    def joined(*arguments: object) -> object:
        if refused:
            raise UserError(refused.pop())
        return join(*arguments)

    monkeypatch.setattr(world.learners, "join", joined)
    world.cluster.restart_learners(ClusterError("lost", ["learner-1"]))
    assert world.learners.lives == {"learner-0": 3, "learner-1": 3}
    assert world.asked == ["the learners start afresh"] * 2


@pytest.mark.parametrize("lost", [["generator-1"], ["reward"], []])
def test_learners_do_not_start_afresh_for_others(world: World, lost):
    error = ClusterError("lost", lost)
    with pytest.raises(ClusterError) as raised:
        world.cluster.restart_learners(error)
    assert raised.value is error
    assert world.learners.called == []


@pytest.mark.parametrize(
    "failure",
    # Another process may still hold the memory: what has started before is no user's mistake.
    [ClusterError("died while starting"), UserError("out of memory")],
)
def test_a_generator_that_never_starts_is_given_up_while_others_serve(world: World, capsys, failure):
    world.actors.fails = [failure]
    world.generators.recover(LOST)
    world.cluster.broadcast_weights(4)
    world.cluster.broadcast_weights(5)
    assert world.actors.lives["generator-1"] == 1 + 1 + 3
    assert capsys.readouterr().out.count("generator-1 is given up, and the run goes on without it") == 1
    assert world.generators.names == ["generator-0"]


@pytest.mark.parametrize("joins", [True, False])
def test_a_node_that_is_to_leave_is_told_of_once_if_actors_are_on_it(monkeypatch, joins):
    world = World(monkeypatch, *(["cluster.address=10.0.0.1:6379"] if joins else []))
    world.addresses |= {"generator-0": "10.0.0.2", "learner-0": "10.0.0.3", "learner-1": "10.0.0.3"}
    told = [{}, {"10.0.0.3": 27.6, "10.0.0.9": 5.0}, {"10.0.0.3": 20.1}, {"10.0.0.3": 10.0, "10.0.0.2": math.inf}]
    told.append({"10.0.0.1": 120.0})  # a head without actors: the driver is on it
    monkeypatch.setattr(recovery, "told_to_leave", lambda: told.pop(0))
    monkeypatch.setattr(recovery, "address_here", lambda: "10.0.0.1")
    news = [world.cluster.news_of_leaving() for _ in range(5)]
    second, fourth, last = (
        "10.0.0.3 (learner-0, learner-1) was told to leave within 28 s",
        "10.0.0.2 (generator-0) was told to leave",
        "10.0.0.1 (the driver) was told to leave within 120 s",
    )
    assert news == (["", second, "", fourth, last] if joins else [""] * 5)


def test_a_generator_that_hangs_in_its_start_is_ended_and_begun_anew(world: World, monkeypatch, capsys):
    """While others serve, nobody waits for it. Only time with room counts."""
    now, ended = [0.0], list[tuple[str, int]]()
    monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(recovery, "end", ended.extend)
    most = world.actors.config.cluster.start_timeout
    world.actors.ready_names.discard("generator-1")
    world.actors.placed.discard("generator-1")
    world.generators.recover(LOST)
    for version, placed in [(1, False), (2, False), (3, True), (4, False), (5, True)]:
        now[0] += 0.9 * most
        (world.actors.placed.add if placed else world.actors.placed.discard)("generator-1")
        world.cluster.broadcast_weights(version)
    assert ended == []
    now[0] += most
    world.cluster.broadcast_weights(6)
    assert ended == [("generator-1", 2)]
    assert f"generator-1: not ready within cluster.start_timeout ({most:g} s)" in capsys.readouterr().out
    world.actors.ready_names.add("generator-1")
    world.cluster.broadcast_weights(7)
    assert world.generators.lives == {"generator-0": 1, "generator-1": 3}


def test_a_generator_that_always_hangs_is_given_up(world: World, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(recovery, "end", list)
    world.actors.ready_names.discard("generator-1")
    world.generators.recover(LOST)
    for version in range(1, 21):
        now[0] += world.actors.config.cluster.start_timeout
        world.cluster.broadcast_weights(version)
    assert capsys.readouterr().out.count("generator-1 is given up, and the run goes on without it") == 1
    assert world.actors.lives["generator-1"] == 1 + 1 + 3


@pytest.mark.parametrize("kind", [ClusterError, UserError])
def test_with_too_few_left_a_generator_that_never_starts_is_a_loss(monkeypatch, kind):
    world = World(monkeypatch, "generators.min=2")
    world.actors.fails = [kind("died while starting")]
    with pytest.raises(ClusterError, match="died while starting"):
        world.generators.recover(LOST)


def test_rollouts_know_that_something_was_lost_since_they_began(world: World):
    for error in (LOST, ClusterError("reward died", ["reward"]), WeightTransferError("other bytes")):
        before = world.generators.losses
        world.generators.recover(error)
        assert world.generators.losses == before + 1


def test_the_only_generator_that_dies_before_a_model_is_exported_is_waited_for(monkeypatch):
    """Otherwise the next rollout would wait for a generator that nobody takes up."""
    world = World(monkeypatch, "generators.min=2")
    world.cluster.broadcast_weights(3)
    world.breaks = [LOST]
    world.cluster.export(Path("model"), {})
    assert world.generators.names == ["generator-0", "generator-1"]
    assert world.events[-2:] == [
        "publish 3 to ['generator-0', 'generator-1'], prompts to ['generator-0']",
        "wait",
    ]


@pytest.mark.parametrize(("newest", "at_least", "taken"), [(None, 0, False), (7, 8, False), (8, 8, True), (9, 8, True)])
def test_a_snapshot_that_is_older_than_the_newest_checkpoint_is_not_taken(world: World, newest, at_least, taken):
    """The journal has no steps before the oldest checkpoint."""
    world.cluster.snapshots = SimpleNamespace(newest=lambda: newest, restore=lambda _: newest)  # type: ignore[assignment]
    assert world.cluster.restore_snapshot(at_least) == (newest if taken else None)
