"""Rewards: plain functions `(prompt, completion) -> float`, weighted in the config.

    rewards:
      format: 1.0
      accuracy: 1.0
      my_package.my_module:brevity: 0.1     # a function of your own

To add a built-in one: write the function in a file of this folder and name it in `REWARDS`. Those run in the reward
actor's process, a user's own in one that may break (`isolation.py`, docs/rewards.md).
"""

import math
from collections.abc import Callable

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import find_function
from rft_cluster.messages import Completion, Prompt
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.containment import containment_reward
from rft_cluster.rewards.format import format_reward

RewardFunction = Callable[[Prompt, Completion], float]

REWARDS: dict[str, RewardFunction] = {
    "format": format_reward,
    "accuracy": accuracy_reward,
    "containment": containment_reward,
}


def load_rewards(weights: dict[str, float]) -> list[tuple[str, float, RewardFunction]]:
    """Name, weight and function of each configured reward, in the config's order.

    Raises:
        UserError: no reward is given, a name is unknown, or a weight is not a finite number.
    """
    if not weights:
        raise UserError("rewards: none is given; set at least one, e.g. rewards.accuracy=1.0")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"rewards.{name}: the weight must be a finite number, got {weight}")
    return [(name, weight, find_function(name, REWARDS, "rewards")) for name, weight in weights.items()]
