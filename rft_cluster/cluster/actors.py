"""Start a run's actors in their reserved bundles, once at its beginning and afresh after a loss.

Roles are plain classes. Here they become actors with names for the dashboard: generator-0, reward, learner-0. A fresh
actor in place of a lost one is generator-0.2, then generator-0.3: a new actor and not the old one restarted, so no call
of its former life can reach it.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rft_cluster.cluster.generator_actor import Generator
from rft_cluster.cluster.gpus import HIDE_GPUS
from rft_cluster.cluster.handles import wait_for
from rft_cluster.cluster.images import StoredImages
from rft_cluster.cluster.placement import ActorPlan, plan_actors
from rft_cluster.cluster.reservation import Reservation
from rft_cluster.cluster.rollouts import CHUNKS
from rft_cluster.common.errors import ClusterError
from rft_cluster.common.hardware import malloc_environment, openmp_environment
from rft_cluster.config import Config
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.generator.vllm_options import environment as generator_environment
from rft_cluster.learner.learner import Learner
from rft_cluster.rewards.scorer import Scorer

# Concurrent calls per generator: 8 chunks in the engine, 1 in advance, the rest of the previous step. Others wait.
# Weight calls have their own threads; otherwise calls that wait for new weights could block the call that brings them.
GENERATOR_CALLS = CHUNKS + 8
WEIGHTS = "weights"
WEIGHT_THREADS = 2
# The scorer is async and fetches images in its own thread. Ray would warn as if that blocked the event loop.
QUIET_GET = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
WAITING_LINE = 10.0  # seconds between lines about actors that are still starting


def environment(config: Config, cpus: float) -> dict[str, str]:
    """Environment of an actor's process, set before it starts."""
    return {
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        HIDE_GPUS: "1",
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "0",  # keep the stack trace of an actor's crash
        **openmp_environment(config.cluster.device),
        **malloc_environment(config.cluster.device),
    }


class Actors:
    """The reserved bundles, and the starts of actors in them."""

    def __init__(self, config: Config, reservation: Reservation, model_path: str, images: StoredImages) -> None:
        self.config, self._reservation, self._model_path, self._images = config, reservation, model_path, images
        self.grows = bool(config.cluster.joins)
        """Whether nodes may join later."""
        self._lives: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """Begin a start: `cluster.start_timeout` runs from here."""
        self._started = time.monotonic()

    def left(self) -> float:
        """Seconds until the actors must be ready."""
        return max(1.0, self._started + self.config.cluster.start_timeout - time.monotonic())

    def is_placed(self, name: str) -> bool:
        """See `Reservation.is_placed`."""
        return self._reservation.is_placed(name)

    # `.remote` returns at once, so actors that are started together import and load at the same time.

    def start_generators(self, names: Sequence[str] | None = None) -> dict[str, ActorHandle]:
        """Start all generators, or those of these names."""
        config = self.config
        _, generators, _ = plan_actors(config)
        options = EngineOptions.of_run(self._model_path, config)
        own = generator_environment(config.cluster.device)
        calls = GENERATOR_CALLS + config.schedule.max_staleness
        names = generators.names if names is None else names
        self._reservation.renew(names)
        return {
            name: ray.remote(concurrency_groups={WEIGHTS: WEIGHT_THREADS})(Generator)
            .options(max_concurrency=calls, **self._options(name, generators, own))
            .remote(options, self._images, config.cluster.interface, {"run": config.run.name, "generator": name})
            for name in names
        }

    def start_learners(self) -> dict[str, ActorHandle]:
        learners, _, _ = plan_actors(self.config)
        self._reservation.renew(learners.names)
        return {
            name: ray.remote(Learner)
            .options(**self._options(name, learners, {}))
            .remote(self._model_path, self.config, rank, max(1, int(learners.cpus)), self._images)
            for rank, name in enumerate(learners.names)
        }

    def start_reward(self) -> dict[str, ActorHandle]:
        *_, reward = plan_actors(self.config)
        return {
            name: ray.remote(Scorer)
            .options(**self._options(name, reward, QUIET_GET))
            .remote(self.config.rewards, self.config.scoring, self._images)
            for name in reward.names
        }

    def _options(self, name: str, role: ActorPlan, own: dict[str, str]) -> dict[str, Any]:
        self._lives[name] += 1
        life = self._lives[name]
        chosen: dict[str, Any] = {
            "name": name if life == 1 else f"{name}.{life}",
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "runtime_env": {"env_vars": environment(self.config, role.cpus) | own},
        }
        if place := self._reservation.place(name):
            chosen["scheduling_strategy"] = PlacementGroupSchedulingStrategy(*place)
        return chosen

    def wait_until_ready(self, handles: Mapping[str, ActorHandle]) -> dict[str, str]:
        """Wait for actors, and print every few seconds which are missing. Returns name -> its host's address.

        Raises:
            ClusterError: some are not ready when the time is over.
        """
        addresses = self.ready(ask_addresses(handles), len(handles))
        return {name: addresses[name] for name in handles}

    def ready(self, asked: Mapping[ray.ObjectRef, str], enough: int) -> dict[str, str]:
        """The addresses of the actors that are ready, when they are `enough`. `asked`: from `ask_addresses`."""
        seconds, waiting, addresses = self.config.cluster.start_timeout, dict(asked), dict[str, str]()
        while waiting:
            short = len(addresses) < enough
            count, timeout = (1, min(WAITING_LINE, self.left())) if short else (len(waiting), 0)
            done, _ = ray.wait(list(waiting), num_returns=count, timeout=timeout)
            answered = {call: waiting.pop(call) for call in done}
            # This raises the error of an actor that failed at once, not when all others are ready.
            addresses |= zip(answered.values(), wait_for(answered, self.left(), "starting"), strict=True)
            if not short:  # whoever else is ready was taken without waiting
                break
            names = ", ".join(waiting.values()) or "nothing more"
            print(f"{time.monotonic() - self._started:4.0f} s: waiting for {names}", flush=True)
            if len(addresses) < enough and time.monotonic() >= self._started + seconds:
                raise self._late(list(waiting.values()))
        return addresses

    def _late(self, names: Sequence[str]) -> ClusterError:
        within = f"within cluster.start_timeout ({self.config.cluster.start_timeout:g} s)"
        if without := [name for name in names if not self.is_placed(name)]:
            return ClusterError(f"{', '.join(without)}: no node had room {within}")  # none is lost
        message = f"not ready {within}: raise it if they only take longer; their output is in Ray's logs, worker-*"
        return ClusterError(f"{', '.join(names)}: {message}", names)


def ask_addresses(handles: Mapping[str, ActorHandle]) -> dict[ray.ObjectRef, str]:
    """Calls that actors answer with their hosts' addresses, as soon as they are ready."""

    def address(actor: Any) -> str:  # nested, so sent by value: actors need not import this module
        return ray.util.get_node_ip_address()

    return {handle.__ray_call__.remote(address): name for name, handle in handles.items()}
