"""The policy that says how probable answers are, as an actor with the device of one learner.

The driver may be on a node without a GPU, and the memory of the actors before it is free by then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from rft_cluster.cluster.alone import alone
from rft_cluster.cluster.handles import wait_for
from rft_cluster.config import Config
from rft_cluster.model.class_logprobs import ClassScorer

NAME = "class-scorer"

Score = Callable[[bytes, str, str, Sequence[str]], tuple[np.ndarray, np.ndarray]]


@contextmanager
def scorer_of(config: Config, model_path: str) -> Iterator[Score]:
    """`ClassScorer.logprobs` of the model in `model_path`, for this context. Raises as `alone`."""
    cluster, threads = config.cluster, max(1, int(config.learners.cpus))
    arguments = (model_path, config.model, cluster.device, cluster.dtype, threads)

    def score(image: bytes, question: str, before: str, answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        found = actor.logprobs.remote(image, question, before, list(answers))
        return wait_for({found: NAME}, cluster.step_timeout, "probabilities")[0]

    with alone(config, NAME, ClassScorer, *arguments) as actor:
        yield score
