"""Which generator writes what, with real Ray and generators that only wait: nobody is held up by one that is slow."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import ray
from ray.actor import ActorHandle

from rft_cluster.cluster import rollouts
from rft_cluster.cluster.actors import GENERATOR_CALLS, WEIGHT_THREADS, WEIGHTS
from rft_cluster.cluster.handles import ActorGroup, RewardActor, wait_for
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.common.errors import ClusterError
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Example, Group, ImageRef, Prompt, Sampling
from rft_cluster.rewards.scorer import Scorer
from tests.integration.waiting import Waiting

GROUP, ROOM = 4, 64  # completions of a prompt, and at once in an engine: 16 prompts, parts of 2
ONE = Example(ImageRef("photos/1", "0" * 64), "one")
PROMPTS = [Prompt(f"train/0/{i}", ONE, "Which digit?", seed=i) for i in range(60)]


@pytest.fixture(scope="module")
def actors() -> Iterator[list[ActorHandle]]:
    """Two that wait, and one that scores."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    remote = ray.remote(concurrency_groups={WEIGHTS: WEIGHT_THREADS})(Waiting)
    waiting = remote.options(num_cpus=0, max_concurrency=GENERATOR_CALLS)
    scorer = ray.remote(Scorer).options(num_cpus=0).remote({"accuracy": 1.0}, ScoringSection(), {})
    ray.get(scorer.__ray_ready__.remote(), timeout=120)
    yield [waiting.remote(), waiting.remote(), scorer]
    ray.shutdown()


Start = Callable[..., Generators]


@pytest.fixture
def start(actors: list[ActorHandle]) -> Iterator[Start]:
    started: list[Generators] = []

    def start(room: int = ROOM, **seconds: float) -> Generators:
        generators = Generators(dict(zip(seconds, actors, strict=False)), 60, room)
        generators.call_each("begin", list(seconds.items()))
        started.append(generators)
        return generators

    yield start
    for generators in started:
        generators.close()


def writers(groups: Sequence[Group]) -> Counter[str]:
    return Counter(group.completions[0].text.split("<")[1].removeprefix("think>") for group in groups)


def wait_for_word(generators: Generators, doing: dict[str, str]) -> None:
    end = time.monotonic() + 12
    while generators.doing() != doing:
        assert time.monotonic() < end, generators.doing()
        time.sleep(0.02)


def test_what_fits_is_one_call_to_each(start: Start):
    generators = start(fast=0.0, slow=0.3)
    groups = generators.generate(PROMPTS[:30], Sampling(GROUP, 1.0, 8), version=0)
    assert [group.prompt for group in groups] == PROMPTS[:30]
    assert generators.call_all("calls") == [[15], [15]]


def test_what_does_not_fit_goes_to_who_has_room_next(start: Start):
    generators = start(fast=0.02, slow=math.inf)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), version=0)
    assert rollout._all_dispatched.wait(12), "the slow one has finished nothing, and nobody waits for it"
    wait_for_word(generators, {"fast": "idle", "slow": f"write {18 * GROUP} completions"})
    generators.call_all("release")
    groups, _ = rollout.wait()
    assert [group.prompt for group in groups] == PROMPTS
    wait_for_word(generators, {"fast": "idle", "slow": "idle"})
    fast, slow = generators.call_all("calls")
    # Each at first has its room and the reserve, in chunks of two; all that is left goes to the fast one.
    assert slow == [2] * 9 and sum(fast) == 60 - 18 and max(fast[9:]) == 2
    assert writers(groups) == {"fast": 42, "slow": 18}


def test_prompts_that_wait_are_dispatched_while_the_loop_is_busy(start: Start):
    generators = start(only=0.01)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), version=0)
    deadline = time.monotonic() + 20
    while rollout.left:  # nobody waits for it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [group.prompt for group in rollout.wait()[0]] == PROMPTS


def test_the_next_rollout_begins_when_the_first_is_dispatched(start: Start):
    generators = start(room=8, only=math.inf)
    first = generators.start(PROMPTS[:8], Sampling(GROUP, 1.0, 8), version=0)
    second = generators.start(PROMPTS[8:20], Sampling(1, 0.0, 8), version=0)
    assert (first.left, second.left) == (5, 12)  # two are its room, one the reserve
    generators.call_all("release")
    assert [group.prompt for group in second.wait()[0]] == PROMPTS[8:20]
    assert first.left == 0
    assert [group.prompt for group in first.wait()[0]] == PROMPTS[:8]


def test_chunks_are_scored_as_they_come(start: Start, actors: list[ActorHandle]):
    generators = start(only=0.2)
    reward = RewardActor({"reward": actors[2]}, 60)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), 0, reward)
    first = rollout._chunks[0]
    assert ray.get(first.rewards, timeout=10)[0][0].total == 1.0
    assert rollout.left, "scored long before the last prompt is dispatched"
    _, rewards = rollout.wait()
    assert [reward.total for group in rewards for reward in group] == [1.0] * 240


def test_what_is_written_first_is_scored_first(start: Start, actors: list[ActorHandle]):
    generators = start(slow=math.inf, fast=0.0)
    rollout = generators.start(PROMPTS[:4], Sampling(GROUP, 1.0, 8), 0, RewardActor({"reward": actors[2]}, 60))
    slow, fast = rollout._chunks
    assert ray.get(fast.rewards, timeout=10)[0][0].total == 1.0
    assert ray.wait([slow.rewards], timeout=0) == ([], [slow.rewards])
    generators.call_all("release")
    assert [len(group) for group in rollout.wait()[1]] == [GROUP] * 4


def test_weights_come_through_however_many_calls_wait(start: Start, actors: list[ActorHandle]):
    generators = start(one=math.inf)
    waiting = [generators.handles[0].generate.remote(PROMPTS[:1], Sampling(1, 1.0, 8), 0) for _ in range(60)]
    assert ray.wait(waiting, timeout=1) == ([], waiting)
    ActorGroup({"one": actors[0]}, 20, WEIGHTS).call_all("release")
    ray.get(waiting, timeout=20)


def test_of_calls_that_wait_for_each_other_one_that_fails_ends_the_wait(start: Start):
    """As both ends of a broadcast do: the other would hang until its deadline."""
    generators = start(one=math.inf, other=0.0)
    hanging = generators.begin_each("generate", [(PROMPTS[:1], Sampling(1, 1.0, 8), 0), (None, None, 0)])
    began = time.monotonic()
    with pytest.raises(TypeError, match="NoneType"):
        wait_for(hanging, 30, "generate")
    assert time.monotonic() - began < 15
    generators.call_all("release")


def test_what_keeps_prompts_from_being_dispatched_is_what_the_waiting_raise(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    generators = start(one=0.1)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), version=0)
    with monkeypatch.context() as full:
        full.setattr(
            rollouts.Rollout, "dispatch", lambda *_: (_ for _ in ()).throw(OSError("the object store is full"))
        )
        with pytest.raises(OSError, match="the object store is full"):
            rollout.wait()
    assert len(generators.generate(PROMPTS[:30], Sampling(GROUP, 1.0, 8), version=0)) == 30


def test_no_prompts_are_no_groups(start: Start):
    assert start(only=0.0).generate([], Sampling(GROUP, 1.0, 8), version=0) == []


def test_closed_it_gives_out_nothing_more(start: Start):
    generators = start(only=0.2)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), version=0)
    generators.close()
    left = rollout.left
    time.sleep(1)
    assert 0 < left == rollout.left


def test_a_learner_that_dies_before_its_digests_ends_the_rollout_and_is_named(start: Start):
    """The generators would wait ten minutes for a verification that cannot come."""

    class Learner:
        def weight_digests(self) -> None:
            os._exit(1)

    generators = start(only=30.0)
    learner = ray.remote(Learner).options(num_cpus=0).remote()
    ray.get(learner.__ray_ready__.remote(), timeout=120)
    digests = {learner.weight_digests.remote(): "learner-1 (digests)"}
    generators.verify = lambda: digests
    rollout = generators.start(PROMPTS[:2], Sampling(GROUP, 1.0, 8), version=0)
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"^learner-1 \(digests\) died while 'generate'"):
        rollout.wait()
    assert time.monotonic() - started < 15


@pytest.fixture
def doomed(actors: list[ActorHandle]) -> ActorHandle:
    """One that never answers, for a test to kill."""
    actor = ray.remote(concurrency_groups={WEIGHTS: WEIGHT_THREADS})(Waiting).options(
        num_cpus=0, max_concurrency=GENERATOR_CALLS
    )
    handle = actor.remote()
    ray.get(handle.begin.remote("doomed", math.inf), timeout=60)
    return handle


@dataclass
class Replacing:
    """Removes what is lost, and counts."""

    generators: Generators
    reward: RewardActor | None = None
    errors: list[ClusterError] = field(default_factory=list)

    def __call__(self, error: ClusterError) -> None:
        self.errors.append(error)
        self.generators.losses += 1
        for name in error.lost & {*self.generators.names}:
            self.generators.remove(name)
        if self.reward and "reward" in error.lost:
            self.reward.kill()
            scorer = ray.remote(Scorer).options(num_cpus=0).remote({"accuracy": 1.0}, ScoringSection(), {})
            self.reward.replace({"reward": scorer})


@pytest.mark.parametrize("late", [False, True], ids=["dead", "frozen"])
def test_others_write_what_a_lost_generator_owed(start: Start, actors: list[ActorHandle], doomed: ActorHandle, late):
    generators = start(other=0.1)
    generators.add("doomed", doomed)
    generators._timeout = 10.0 if late else 60.0
    generators.recover = replacing = Replacing(generators)
    rollout = generators.start(PROMPTS[:30], Sampling(GROUP, 1.0, 8), 0, RewardActor({"reward": actors[2]}, 60))
    later = generators.start(PROMPTS[30:40], Sampling(GROUP, 1.0, 8), 0, RewardActor({"reward": actors[2]}, 60))
    if not late:
        ray.kill(doomed)
    groups, rewards = rollout.wait()
    assert [group.prompt for group in groups] == PROMPTS[:30]
    assert [reward.total for own in rewards for reward in own] == [1.0] * 120
    assert writers(groups) == {"other": 30}
    assert generators.names == ["other"]
    assert [group.prompt for group in later.wait()[0]] == PROMPTS[30:40]
    assert len(replacing.errors) == 1, "the later rollout asks again without meeting the loss a second time"
    assert sum(generators.call_all("calls")[0]) == 40, "nothing is written twice"


def test_prompts_that_wait_for_room_are_not_lost_with_a_generator(start: Start, doomed: ActorHandle):
    generators = start(room=8, other=0.01)
    generators.add("doomed", doomed)
    generators.recover = Replacing(generators)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), version=0)
    assert rollout.left
    ray.kill(doomed)
    groups, _ = rollout.wait()
    assert [group.prompt for group in groups] == PROMPTS
    assert sum(generators.call_all("calls")[0]) == 60


def test_what_a_lost_scorer_owed_is_scored_again_and_nothing_is_written_again(start: Start):
    generators = start(only=0.2)
    scorer = ray.remote(Scorer).options(num_cpus=0).remote({"accuracy": 1.0}, ScoringSection(), {})
    ray.get(scorer.__ray_ready__.remote(), timeout=120)
    reward = RewardActor({"reward": scorer}, 60)
    generators.recover = replacing = Replacing(generators, reward)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), 0, reward)
    later = generators.start(PROMPTS[:4], Sampling(GROUP, 1.0, 8), 0, reward)
    ray.get(rollout._chunks[0].rewards, timeout=20)
    ray.kill(scorer)
    groups, rewards = rollout.wait()
    assert len(later.wait()[1]) == 4
    assert [group.prompt for group in groups] == PROMPTS
    assert [reward.total for own in rewards for reward in own] == [1.0] * 240
    assert [error.lost for error in replacing.errors] == [{"reward"}], "and the later rollout meets no second loss"
    assert sum(generators.call_all("calls")[0]) == 64


def test_prompts_that_find_no_generator_are_dispatched_when_one_comes(start: Start, actors: list[ActorHandle]):
    generators = start(other=0.0)
    generators._handles.clear()
    rollout = generators.start(PROMPTS[:4], Sampling(GROUP, 1.0, 8), version=0)
    assert rollout.left == 4
    generators.add("other", actors[0])
    assert rollout.left == 0
    assert [group.prompt for group in rollout.wait()[0]] == PROMPTS[:4]


def test_what_cannot_be_replaced_ends_the_rollout(start: Start, doomed: ActorHandle):
    generators = start(other=0.1)
    generators.add("doomed", doomed)
    rollout = generators.start(PROMPTS, Sampling(GROUP, 1.0, 8), version=0)
    ray.kill(doomed)
    with pytest.raises(ClusterError, match=r"^doomed died while 'generate'"):
        rollout.wait()
