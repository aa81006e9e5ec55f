"""The reward actor with a function of the user's own, in a real Ray actor, which has child processes there."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rft_cluster.cluster.handles import RewardActor, wait_for
from rft_cluster.cluster.images import StoredImages
from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.data.images import image_sha256
from rft_cluster.messages import Completion, Example, Group, ImageRef, Prompt, Reward
from rft_cluster.rewards.scorer import Scorer
from tests.integration.conftest import is_alive

MODULE = """
import asyncio, os, time

running = 0

async def judge(prompt, completion):
    global running
    running += 1
    at_once = running
    await asyncio.sleep(0.3)
    running -= 1
    return at_once

def moody(prompt, completion):
    match completion.text:
        case "die": os._exit(7)
        case "hang": time.sleep(3600)
        case "raise": raise KeyError("petal")
        case "key": return float(os.environ["JUDGE_KEY"] == "sesame")
        case "pids": return os.getppid() * 1e7 + os.getpid()
    return len(prompt.image)
"""
IMAGE = b"x" * 300
NAME = "my_moody_reward:moody"


PROMPT = Prompt("train/0/0", Example(ImageRef("photos/a.png", image_sha256(IMAGE)), "rose"), "Which?", 0)


def groups_of(*texts: str) -> list[Group]:
    return [Group(PROMPT, [1, 2], [Completion([1], [-0.1], text, "stop", 0) for text in texts])]


def score(actor: RewardActor, *texts: str) -> list[Reward]:
    """The rewards of one group of these completions, which is the whole step."""
    scored = actor.score(ray.put(groups_of(*texts)), len(texts))
    ((rewards,),) = wait_for({scored: "reward"}, 120, "score")
    return rewards


@pytest.fixture(scope="module")
def actor(tmp_path_factory) -> Iterator[RewardActor]:
    """Its module lies in the driver's working folder."""
    folder: Path = tmp_path_factory.mktemp("own")
    (folder / "my_moody_reward.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JUDGE_KEY", "sesame")
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="warning")
        scoring = ScoringSection(time_limit=2.0, failure_budget=0.6)
        scorer = ray.remote(Scorer).options(num_cpus=0)
        handle = scorer.remote({"format": 1.0, NAME: 1.0}, scoring, StoredImages({image_sha256(IMAGE): IMAGE}))
        yield RewardActor({"reward": handle}, timeout=120)
        ray.shutdown()


def test_what_fails_is_masked_and_the_actor_lives(actor: RewardActor):
    rewards = score(actor, "x", "die", "raise", "hang", "x")
    assert [reward.total for reward in rewards] == [300.0, None, None, None, 300.0]
    reasons = [reward.failures[NAME] for reward in rewards[1:4]]
    assert reasons[0] == "its process died (exit code 7)"
    assert reasons[1].startswith("KeyError: 'petal' (my_moody_reward.py, line ")
    assert reasons[2] == "no answer within 2 s"


def test_the_function_has_the_environment_of_who_started_ray(actor: RewardActor):
    assert score(actor, "key")[0].parts[NAME] == 1.0


def test_over_budget_is_the_users_error_without_the_actors_traceback(actor: RewardActor):
    with pytest.raises(UserError, match=rf"^rewards\.{NAME} failed on 2 of the 3 completions .*KeyError: 'petal'"):
        score(actor, "raise", "x", "raise")
    assert score(actor, "x")[0].total == 300.0, "it would go on"


def test_calls_overlap_and_share_the_limit(actor: RewardActor):
    """The parts of a step are scored together: 4 of 8 completions, 16 at once."""
    images = StoredImages({image_sha256(IMAGE): IMAGE})
    scoring = ScoringSection(max_concurrent=16)
    handle = ray.remote(Scorer).options(num_cpus=0).remote({"my_moody_reward:judge": 1.0}, scoring, images)
    judge = RewardActor({"reward": handle}, timeout=120)
    groups = ray.put(groups_of(*["x"] * 8))
    parts = [judge.score(groups, 32) for _ in range(4)]
    scored = wait_for(dict.fromkeys(parts, "reward"), 120, "score")
    assert max(reward.total for part in scored for rewards in part for reward in rewards) == 16


def test_a_killed_actor_leaves_no_process_behind(actor: RewardActor):
    parent, child = divmod(round(score(actor, "pids")[0].parts[NAME]), 10_000_000)
    assert is_alive(child)
    ray.kill(actor.handles[0])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(is_alive, (parent, child))):
        time.sleep(0.1)
    assert not is_alive(parent)
    assert not is_alive(child)
