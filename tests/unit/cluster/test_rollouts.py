import pytest

from rft_cluster.cluster import rollouts
from rft_cluster.cluster.rollouts import Generators, assign
from rft_cluster.messages import Group, Sampling
from tests.unit.cluster.local import LocalActor, local_actors
from tests.unit.some_prompt import some_prompt


def test_prompts_are_assigned_evenly_and_in_turns():
    assert assign({"a": 0, "b": 0, "c": 0}, 7, size=8, most=99) == {"a": [0, 3, 6], "b": [1, 4], "c": [2, 5]}


def test_a_generator_that_is_behind_gets_fewer():
    # b has 3 prompts of 8 left: a takes 0 to 2, then they take turns, the first of equals first.
    assert assign({"a": 0, "b": 24}, 6, size=8, most=99) == {"a": [0, 1, 2, 3, 5], "b": [4]}


def test_none_goes_to_one_that_is_far_behind():
    assert assign({"a": 0, "b": 90}, 8, size=1, most=99) == {"a": list(range(8))}
    assert assign({"a": 0}, 0, size=1, most=99) == {}


def test_nobody_gets_more_than_there_is_room_for():
    # a takes two and is level with b, takes one more, and then b has room for one.
    assert assign({"a": 0, "b": 16, "c": 24}, 9, size=8, most=24) == {"a": [0, 1, 2], "b": [3]}
    assert assign({"a": 17, "b": 24}, 9, size=8, most=24) == {}


def test_one_that_has_nothing_gets_even_a_group_that_is_larger_than_its_room():
    assert assign({"a": 0, "b": 1}, 3, size=8, most=4) == {"a": [0]}


def test_prompts_that_no_generator_has_room_for_are_counted():
    generators = Generators({}, 5, 8)
    for number in range(2):
        generators.start([some_prompt(f"train/{number}/{index}") for index in range(3)], Sampling(1, 1.0, 8), 0)
    assert generators.waiting == 6
    generators.forget()
    assert generators.waiting == 0


def test_the_verification_of_weights_starts_after_the_dispatch_and_before_the_wait(monkeypatch: pytest.MonkeyPatch):
    """Generators return no group before it; started earlier, its calls would hold up the dispatch."""
    events = []

    class Generator:
        def generate(self, prompts, sampling, version):
            return [Group(prompt, [1], []) for prompt in prompts]

    def verify():
        events.append("verify")
        return {}

    with local_actors(monkeypatch) as threads:
        monkeypatch.setattr(rollouts, "wait_for", lambda calls, *_: [call.result() for call in calls])
        generators = Generators({"generator-0": LocalActor(Generator(), threads)}, 5, 8, verify)
        rollout = generators.start([some_prompt()], Sampling(1, 1.0, 8), version=0)
        assert events == []
        assert [group.prompt_token_ids for group in rollout.wait()[0]] == [[1]]
        assert events == ["verify"]
