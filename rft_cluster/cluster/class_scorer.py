"""The policy that says how probable answers are, as an actor with the device of one learner.

The driver may be on a node without a GPU, and the memory of the actors before it is free by then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from rft_cluster.cluster.alone import alone
from rft_cluster.cluster.handles import wait_for
from rft_cluster.cluster.nodes import everywhere
from rft_cluster.config import Config
from rft_cluster.model.class_logprobs import ClassScorer

NAME = "class-scorer"

Score = Callable[[bytes, str, str, Sequence[str]], tuple[np.ndarray, np.ndarray]]


@contextmanager
def scorers(config: Config) -> Iterator[Callable[[str], Score]]:
    """For this context: the folder of a model -> its `ClassScorer.logprobs`, until the next one is asked for.

    Raises as `alone`, and UserError if a model cannot be loaded.
    """
    cluster, threads = config.cluster, max(1, int(config.learners.cpus))
    with alone(config, NAME, ClassScorer, config.model, cluster.device, cluster.dtype, threads) as actor:

        def score(image: bytes, question: str, before: str, answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            found = actor.logprobs.remote(image, question, before, list(answers))
            return wait_for({found: NAME}, cluster.step_timeout, "probabilities")[0]

        def scorer_of(path: str) -> Score:
            wait_for({actor.load.remote(everywhere(path)): NAME}, cluster.start_timeout, "loading a model")
            return score

        yield scorer_of
