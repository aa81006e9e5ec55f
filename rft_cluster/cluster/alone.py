"""One actor by itself, when the actors of a run or of an evaluation have ended."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle

from rft_cluster.cluster.actors import ask_addresses, environment
from rft_cluster.cluster.handles import wait_for
from rft_cluster.cluster.start import connect
from rft_cluster.config import Config


@contextmanager
def alone(config: Config, name: str, role: Callable[..., Any], *arguments: Any) -> Iterator[ActorHandle]:
    """Start `role(*arguments)` with the device of one learner, and end it, and the connection, with the context.

    A learner that shares a GPU has a generator beside it, which sleeps; this actor gets a whole one, lest another run's
    actor comes to it.

    Raises:
        UserError: the cluster cannot be joined.
        ClusterError: the actor is not ready within `cluster.start_timeout`.
    """
    cpus, gpus, timeout = config.learners.cpus, math.ceil(config.learners.gpus), config.cluster.start_timeout
    connect(config.cluster, cpus)
    try:
        options = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment(config, cpus)}}
        actor = ray.remote(role).options(**options).remote(*arguments)
        wait_for(ask_addresses({name: actor}), timeout, "starting")
        yield actor
    finally:
        ray.shutdown()
