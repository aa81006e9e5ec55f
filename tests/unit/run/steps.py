"""One step of a run, made by hand: what its roles gave, and how long each stage took."""

import math
from typing import Any

from some_prompt import some_prompt

from rft_cluster.messages import Completion, CompletionGap, Group, LearnerStats, Reward
from rft_cluster.run.metrics import StepStats, step_stats


def completion(length: int, finish_reason: str = "stop", version: int = 7) -> Completion:
    return Completion([5] * length, [-0.5] * length, "<think>ä</think>", finish_reason, version)


def group(number: int, *completions: Completion) -> Group:
    prompt = some_prompt(f"train/7/{number}", f"digits/{number}", b"", "Which digit?", "seven", 0)
    return Group(prompt, [1, 2], list(completions))


def reward(format_part: float, accuracy_part: float) -> Reward:
    return Reward(format_part + accuracy_part, {"format": format_part, "accuracy": accuracy_part})


# One group of different rewards, one of equal ones; one completion was cut short, one is a version older.
GROUPS = [
    group(0, completion(3), completion(5, "length", version=6)),
    group(1, completion(4), completion(4)),
]
REWARDS = [[reward(1, 0), reward(1, 1)], [reward(0, 0), reward(0, 0)]]
ADVANTAGES = [[-0.7, 0.7], [0.0, 0.0]]
LEARNER = LearnerStats(
    **{"tokens": 8, "logprob_gap": 0.4, "kl": 0.8, "entropy": 16.0, "importance": 8.0, "clipped": 2},
    logprob_gaps=(CompletionGap("train/7/0", 0, 0.25), CompletionGap("train/7/0", 1, math.nan)),
    **{"loss": -0.5, "grad_norm": 1.5, "learning_rate": 1e-4, "updates": 1, "memory_gib": 0.5},
)
SECONDS = {"generate": 2.0, "score": 0.0, "learn": 1.5, "transfer": 0.5}


def stats(step: int = 8, **changes: Any) -> StepStats:
    """The figures of this step, or of one with other arguments of `step_stats`."""
    made = {"groups": GROUPS, "rewards": REWARDS, "advantages": ADVANTAGES, "learned": LEARNER, "seconds": SECONDS}
    return step_stats(step, **{**made, **changes})
