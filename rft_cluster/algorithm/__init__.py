"""GRPO as mathematics, from rewards to the loss: pure functions, three of which the configuration names. And SFT.

    algorithm:
      total: weighted_sum               # totals.py: several rewards -> one number
      advantage: grpo                   # advantages.py: a step's numbers -> advantages
      normaliser: my_module:my_mean     # normalisers.py: lengths -> weights of tokens in the loss; here your own

To add a built-in one: write the function in the file for its kind, and name it below. Imports only `common`, `config`
and the messages.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rft_cluster.algorithm import advantages, normalisers, totals
from rft_cluster.algorithm.samples import Algorithm
from rft_cluster.common.function import Function
from rft_cluster.common.lookup import find_function
from rft_cluster.config import Config
from rft_cluster.messages import Reward

TOTALS: dict[str, Callable[..., Any]] = {
    "weighted_sum": totals.weighted_sum,
    "normalised_sum": totals.normalised_sum,
}
ADVANTAGES: dict[str, Callable[..., Any]] = {
    "grpo": advantages.grpo,
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "gpg": advantages.gpg,
}
TARGET = "target"  # the advantage of SFT, which cannot be chosen for GRPO
NORMALISERS: dict[str, Callable[..., Any]] = {
    "completion": normalisers.completion,
    "token": normalisers.token,
    "constant": normalisers.constant,
}


def load_algorithm(config: Config) -> Algorithm:
    """The algorithm that a configuration names, tried once on a step of two groups.

    Raises:
        UserError: a name is unknown (the message gives the nearest one), or the user's own function cannot be imported,
            takes other arguments, raises, or returns a wrong type or shape.
    """
    chosen = config.algorithm
    total, advantage = (chosen.total, chosen.advantage) if chosen.samples else ("weighted_sum", TARGET)
    known = ADVANTAGES if chosen.samples else {TARGET: advantages.target}
    algorithm = Algorithm(
        total=_function("total", total, TOTALS, "total(rewards, weights) -> a number for each"),
        advantage=_function("advantage", advantage, known, "advantage(rewards) -> a list for each group"),
        normaliser=_function(
            "normaliser", chosen.normaliser, NORMALISERS, "normaliser(lengths, max_tokens) -> a weight for each length"
        ),
        weights=config.scored,
        max_tokens=config.sampling.max_tokens,
        kl_beta=chosen.kl_beta,
    )
    _try(algorithm)
    return algorithm


def _function(key: str, name: str, known: dict[str, Callable[..., Any]], form: str) -> Function:
    return Function(f"algorithm.{key}: {name!r}", form, find_function(name, known, f"algorithm.{key}"))


def _try(algorithm: Algorithm) -> None:
    """Run the functions on a step of two groups, one with different rewards and one with equal rewards."""
    levels = [[0.0, 0.5, 1.0], [1.0, 1.0]]
    algorithm.advantages([[_reward(level, algorithm.weights) for level in group] for group in levels])
    algorithm.token_weights([1, 2, 3, 4, 5])


def _reward(level: float, weights: Mapping[str, float]) -> Reward:
    return Reward(sum(weight * level for weight in weights.values()), dict.fromkeys(weights, level))
