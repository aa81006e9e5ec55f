"""What each actor is doing, as far as its calls in flight tell."""

from types import SimpleNamespace

import pytest

from rft_cluster.cluster import handles
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.handles import ActorGroup, Learners, RewardActor
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.config import load_config
from rft_cluster.messages import Sampling
from tests.unit.some_prompt import some_prompt


class Calls:
    """Stands in for Ray: a call is its actor's and its own name, and goes on until it is answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answered: set[tuple[str, str]] = set()
        monkeypatch.setattr(handles, "ray", SimpleNamespace(wait=self._wait))

    def actor(self, name: str) -> "Actor":
        return Actor(name)

    def _wait(self, calls, num_returns, timeout, fetch_local=True):
        assert (num_returns, timeout) == (len(calls), 0), "nobody waits"
        return [call for call in calls if call in self.answered], [call for call in calls if call not in self.answered]


class Actor:
    def __init__(self, name: str) -> None:
        self._name, self._calls = name, 0

    def __getattr__(self, method: str) -> SimpleNamespace:
        call = SimpleNamespace(remote=lambda *_: self._call(method))
        call.options = lambda **_: call
        return call

    def _call(self, method: str) -> tuple[str, str]:
        self._calls += 1
        return self._name, f"{method} {self._calls}"


@pytest.fixture
def calls(monkeypatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def cluster(calls) -> Cluster:
    generators = {name: calls.actor(name) for name in ("generator-0", "generator-1")}
    learners = Learners({name: calls.actor(name) for name in ("learner-0", "learner-1")}, 9.0)
    weights = WeightSync(learners, ActorGroup(generators, 9.0), "nccl", 1)
    reward = RewardActor({"reward": calls.actor("reward")}, 9.0)
    return Cluster(Generators(generators, 9.0, 16), reward, learners, weights, load_config("digits", []))


def test_actors_without_a_call_are_idle(cluster):
    names = ("generator-0", "generator-1", "reward", "learner-0", "learner-1")
    assert cluster.doing() == dict.fromkeys(names, "idle")


def test_generators_write_and_learners_update_until_they_have_answered(cluster, calls, monkeypatch):
    monkeypatch.setattr("rft_cluster.cluster.rollouts.ray", handles.ray)
    cluster.start_rollout([some_prompt(f"train/0/{i}") for i in range(3)], Sampling(8, 1.0, 16), 0)
    cluster.learners.begin_each("update", [(), ()])
    assert cluster.doing() == {
        **{"generator-0": "write 16 completions", "generator-1": "write 8 completions"},
        "reward": "score what is written",
        **{"learner-0": "update", "learner-1": "update"},
    }
    calls.answered |= {("generator-0", "generate 1"), ("generator-0", "generate 2"), ("learner-1", "update 1")}
    assert cluster.doing() == {
        **{"generator-0": "idle", "generator-1": "write 8 completions"},
        "reward": "score what is written",
        **{"learner-0": "update", "learner-1": "idle"},
    }


def test_weights_are_seen_at_both_ends_and_a_lost_actor_is_no_longer_named(cluster):
    cluster.learners.begin_all("publish_weights")
    cluster.weights._generators.begin_each("load_weights", [(), ()])
    assert cluster.doing() == {
        **{"generator-0": "load weights", "generator-1": "load weights", "reward": "idle"},
        **{"learner-0": "publish weights", "learner-1": "publish weights"},
    }
    cluster.learners.replace({"learner-0": Actor("learner-0")})
    assert "learner-1" not in cluster.doing()


def test_a_fresh_generator_starts(cluster):
    cluster._recovery = SimpleNamespace(coming=["generator-2"])
    assert cluster.doing()["generator-2"] == "start"
