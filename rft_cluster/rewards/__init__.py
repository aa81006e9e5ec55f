"""Rewards: functions `(prompt, completion) -> float`, weighted in the config.

    rewards:
      format: 1.0
      accuracy: 1.0
      my_package.my_module:brevity: 0.1     # a function of your own

A user's own function may be `async`. With the parameters `(prompts, completions)` it takes a batch and returns a list
of values. It runs in a separate process, which may fail (`isolation.py`, docs/rewards.md). To add a built-in one, which
runs in the reward actor's process: write the function in a file of this folder and name it in `REWARDS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rft_cluster.common.lookup import split_name
from rft_cluster.messages import Completion, Images, Prompt
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.containment import containment_reward
from rft_cluster.rewards.format import format_reward


@dataclass(frozen=True, slots=True)
class RewardPrompt(Prompt):
    """The prompt for a user's own reward function, with `image`, the encoded bytes (PNG, JPEG, ...).

    Messages between the roles have a reference instead of the bytes.
    """

    image: bytes


def with_image(prompt: Prompt, images: Images) -> RewardPrompt:
    """The prompt as a function of the user's own gets it."""
    image = images[prompt.example.image.sha256]
    return RewardPrompt(prompt.prompt_id, prompt.example, prompt.text, prompt.seed, image)


BuiltIn = Callable[[Prompt, Completion], float]

REWARDS: dict[str, BuiltIn] = {
    "format": format_reward,
    "accuracy": accuracy_reward,
    "containment": containment_reward,
}


def check_names(names: Iterable[str]) -> None:
    """Check that each name is a built-in reward or a dotted path, without an import.

    A user's module could end or block the process.

    Raises:
        UserError: a name is neither.
    """
    for name in names:
        if name not in REWARDS:
            split_name(name, REWARDS, "rewards")
