"""Connect to Ray, reserve resources, start and stop the actors.

    with start_cluster(config, model_path, task.dataset.images) as cluster:
        cluster.broadcast_weights(version=0)
        groups = cluster.generators.generate(prompts, sampling, version=0)

Roles are plain classes. Here they become actors with names for the dashboard: generator-0, reward, learner-0. Every
wait has a deadline.
"""

import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.generator_actor import Generator
from rft_cluster.cluster.gpus import HIDE_GPUS
from rft_cluster.cluster.handles import ActorGroup, Learners, RewardActor, wait_for
from rft_cluster.cluster.images import StoredImages
from rft_cluster.cluster.nodes import addresses_of, check_gpus, cluster_nodes, fetch_model
from rft_cluster.cluster.placement import (
    ActorPlan,
    Bundle,
    bundles,
    by_host,
    describe_placement,
    place,
    plan_actors,
)
from rft_cluster.cluster.rollouts import CHUNKS, Generators
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.common import stopping
from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.common.hardware import hardware, malloc_environment, openmp_environment
from rft_cluster.config import ClusterSection, Config
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
ADDRESS_TIMEOUT = 10.0  # seconds after which an address counts as unreachable
WAITING_LINE = 10.0  # seconds between lines about actors that are still starting
# Words in the messages of Ray's core about a missing or wrong token.
TOKEN = re.compile(r"InvalidAuthToken|Unauthenticated|auth\w* token|token auth", re.IGNORECASE)
RESERVE_TIMEOUT = 60.0  # seconds after which resources count as taken by others
APART_TIMEOUT = 5.0  # seconds for the attempt to place learners and generators as two groups


def connect(config: ClusterSection, cpus: float) -> str:
    """Join the cluster of the configuration or of RAY_ADDRESS; without one, start Ray on this machine.

    Returns one line for the user with the dashboard's address.

    Raises:
        UserError: the address does not answer, the cluster cannot be joined, or Ray cannot start here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(HIDE_GPUS, "1")
    # If several actors fail, the first error is raised. Without this, Ray prints the others' tracebacks as well.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # This logger only says, on every start, that tokens are on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address and ":" in address:
        # Ray would wait minutes for an unreachable address.
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=ADDRESS_TIMEOUT).close()
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at {address!r}: {error}") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address:
        return f"Ray cluster at {address}, dashboard http://{_join(address, quiet)}"
    # Tell Ray as many CPUs as the plan needs: they only determine threads, and one core still runs the demo.
    available = max(os.cpu_count() or 1, math.ceil(cpus))
    # "local": do not join another cluster that happens to run on this machine.
    local: dict[str, Any] = {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
    try:
        url = _init(num_cpus=available, **local, **quiet)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise UserError(
            f"Ray could not start on this machine: {error}\nIts logs are in session_latest/logs of the folder ray in "
            f"RAY_TMPDIR, TMPDIR or /tmp"
        ) from error
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)  # Ray creates the file readable for all users
    return f"Ray started here, dashboard http://{url} (it asks for a token: ray get-auth-token)"


def _join(address: str, options: dict[str, Any]) -> str:
    """Join a running cluster. Returns the dashboard's address.

    Raises:
        UserError: the cluster refused the token, or cannot be joined for another reason.
    """
    with tempfile.TemporaryFile() as said:
        try:
            with _errors_to(said):
                return _init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            said.seek(0)
            reasons = list(dict.fromkeys(map(str, (error, error.__cause__ or error))))
            if TOKEN.search("\n".join([said.read().decode(errors="replace"), *reasons])):
                raise UserError(
                    f"the Ray cluster at {address} asks for a token and did not get the right one: export "
                    f"RAY_AUTH_MODE=token, and copy the file ~/.ray/auth_token of the cluster's head to this machine"
                ) from error
            raise UserError(f"the Ray cluster at {address} cannot be joined: {'; '.join(reasons)}") from error


@contextmanager
def _errors_to(file: IO[bytes]) -> Iterator[None]:
    """Redirect standard error to a file within this context, including the output of Ray's core.

    Ray's core prints the reason of a failure many times, but the exception that it raises lacks it.
    """
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "wb") as kept:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept.fileno(), 2)


def _init(**options: Any) -> str:
    """Call `ray.init` and restore the signal handlers that it replaces. Returns the dashboard's address."""
    try:
        url = ray.init(**options).dashboard_url
    except SystemExit as end:  # raised by Ray's own signal handler
        raise stopping.stop_for(signal.SIGTERM) from end
    stopping.take_signals()
    return url


def check_cluster(config: Config, patience: float = 0) -> str:
    """Check the plan against a running cluster without starting anything. Returns lines for the user.

    Args:
        patience: seconds to wait for resources that others hold. With 0, taken resources are only reported.

    Raises:
        UserError: the cluster does not answer, is too small, or its resources are still taken after `patience`.
    """
    where = connect(config.cluster, cpus=0)
    try:
        nodes, wanted, deadline = cluster_nodes(), bundles(config), time.monotonic() + patience
        lines = [f"{where}: it can hold the run", describe_placement(config, nodes)]
        if any(bundle.gpus for bundle in wanted):
            check_gpus({node.node_id: node.address for node in place(config, nodes)})
        while (taken := _taken(wanted)) and time.monotonic() < deadline:
            time.sleep(1)
        if taken and patience:
            raise UserError(taken)
        return "\n".join([*lines, taken] if taken else lines)
    finally:
        ray.shutdown()


def _taken(wanted: Sequence[Bundle]) -> str:
    """A message about resources of the bundles that others hold; empty if all are free."""
    free = ray.available_resources()
    needs = {"CPU": sum(bundle.cpus for bundle in wanted), "GPU": sum(bundle.gpus for bundle in wanted)}
    if all(free.get(name, 0) + 1e-6 >= need for name, need in needs.items()):
        return ""
    return (
        f"the cluster is large enough, but its resources are taken: {free.get('CPU', 0):g} CPUs and "
        f"{free.get('GPU', 0):g} GPUs are free, {needs['CPU']:g} and {needs['GPU']:g} are needed. Stop other jobs or "
        f"wait."
    )


@contextmanager
def start_cluster(config: Config, model_path: str, images: Mapping[str, bytes]) -> Iterator[Cluster]:
    """Connect, start all actors, and stop them at the end of the context. `images`: of every prompt, by SHA-256.

    Raises:
        UserError: the cluster lacks resources, or others hold them.
        ClusterError: an actor did not become ready in time.
    """
    with _reserved(config, True, model_path) as reservation:
        stored = StoredImages(images)  # the driver keeps the references, for actors that restart
        cluster = _start_actors(reservation, model_path, stored)
        with closing(cluster.generators):
            yield cluster


@contextmanager
def start_generators(config: Config, model_path: str, images: Mapping[str, bytes]) -> Iterator[Generators]:
    """Start only the generators, with the weights in `model_path` as version 0. Raises as `start_cluster`."""
    with _reserved(config, False, model_path) as reservation:
        stored = StoredImages(images)
        handles = reservation.start_generators(model_path, stored)
        reservation.wait_until_ready(handles)
        with closing(Generators(handles, config.cluster.step_timeout, config.generators.max_concurrent)) as generators:
            generators.call_all("serve_checkpoint", 0)
            yield generators


@contextmanager
def _reserved(config: Config, training: bool, model_path: str) -> Iterator["_Reservation"]:
    wanted = bundles(config, training)
    print(connect(config.cluster, sum(bundle.cpus for bundle in wanted)), flush=True)
    try:
        place(config, cluster_nodes(), training)  # refuses at once a run that these nodes can never hold
        groups = _reserve(config, wanted)
        if config.cluster.joins:  # on this machine both are done before Ray starts
            _prepare(addresses_of(groups), config, model_path)
        yield _Reservation(config, groups, wanted, time.monotonic() + config.cluster.start_timeout)
        _give_back(groups)
    finally:
        ray.shutdown()


def _prepare(nodes: Mapping[str, str], config: Config, model_path: str) -> None:
    """What nodes need before actors start there and their deadline runs. `nodes`: Ray's node id -> address."""
    if config.cluster.device == "cuda":
        check_gpus(nodes)
    fetch_model(nodes, model_path, config.cluster.step_timeout)


def _reserve(config: Config, wanted: Sequence[Bundle]) -> list[PlacementGroup]:
    """Reserve all bundles, in one or two groups, in order. Ray places each group on as few nodes as possible.

    No bundle is bound to a node: Ray uses free resources, and can move a bundle if its node is lost.

    Raises:
        UserError: others hold the resources.
    """
    # Learners communicate at every layer, so they should share a node. In one group Ray would place large generators
    # first and might scatter the learners. So learners get a group of their own, unless that leaves no room.
    learners = [bundle for bundle in wanted if len(bundle.actors) == 1 and bundle.actors[0].startswith("learner")]
    attempts = [({"": wanted}, min(RESERVE_TIMEOUT, config.cluster.start_timeout))]
    if learners:
        attempts.insert(0, ({"-learners": learners, "-others": wanted[len(learners) :]}, APART_TIMEOUT))
    for parts, timeout in attempts:
        # Ray refuses a second group of the same name.
        groups = [_group(f"rft-{config.run.name}{which}", part) for which, part in parts.items()]
        if all(group.wait(timeout) for group in groups):
            return groups
        _give_back(groups)
    raise UserError(_taken(wanted) or "the cluster has room, but in parts that are too small: wait for other jobs")


def _group(name: str, part: Sequence[Bundle]) -> PlacementGroup:
    needs = [{name: has for name, has in (("CPU", b.cpus), ("GPU", b.gpus)) if has} for b in part]
    return placement_group(needs, strategy="PACK", name=name)


def _give_back(groups: Sequence[PlacementGroup]) -> None:
    for group in groups:
        remove_placement_group(group)


def _environment(config: Config, cpus: float) -> dict[str, str]:
    """Environment of an actor's process, set before it starts."""
    return {
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        HIDE_GPUS: "1",
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "0",  # keep the stack trace of an actor's crash
        **openmp_environment(config.cluster.device),
        **malloc_environment(config.cluster.device),
    }


class _Reservation:
    """The reserved bundles, and the start of actors in them until `deadline`."""

    def __init__(
        self, config: Config, groups: Sequence[PlacementGroup], wanted: Sequence[Bundle], deadline: float
    ) -> None:
        """`groups` hold the bundles `wanted`, in their order."""
        self.config, self._deadline = config, deadline
        places = [(group, index) for group in groups for index in range(group.bundle_count)]
        self._places = {name: place for bundle, place in zip(wanted, places, strict=True) for name in bundle.actors}
        self._started = time.monotonic()

    def left(self) -> float:
        return max(1.0, self._deadline - time.monotonic())

    def options(self, name: str, role: ActorPlan, environment: dict[str, str]) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "name": name,
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "runtime_env": {"env_vars": _environment(self.config, role.cpus) | environment},
        }
        if name in self._places:
            chosen["scheduling_strategy"] = PlacementGroupSchedulingStrategy(*self._places[name])
        return chosen

    def start_generators(self, model_path: str, images: StoredImages) -> dict[str, Any]:
        config = self.config
        _, generators, _ = plan_actors(config)
        options = EngineOptions.of_run(model_path, config)
        environment = generator_environment(config.cluster.device)
        calls = GENERATOR_CALLS + config.schedule.max_staleness
        return {
            name: ray.remote(concurrency_groups={WEIGHTS: WEIGHT_THREADS})(Generator)
            .options(max_concurrency=calls, **self.options(name, generators, environment))
            .remote(options, images, config.cluster.interface)
            for name in generators.names
        }

    def wait_until_ready(self, handles: dict[str, Any]) -> dict[str, str]:
        """Wait for all actors, and print every few seconds which are missing. Returns name -> its host's address.

        Raises:
            ClusterError: some are not ready when the time is over.
        """
        seconds = self.config.cluster.start_timeout

        def address(actor: Any) -> str:  # nested, so sent by value: actors need not import this module
            return ray.util.get_node_ip_address()

        waiting = {handle.__ray_call__.remote(address): name for name, handle in handles.items()}
        addresses: dict[str, str] = {}
        while waiting and time.monotonic() < self._deadline:
            done, _ = ray.wait(list(waiting), timeout=min(WAITING_LINE, self.left()))
            ready = {call: waiting.pop(call) for call in done}
            # This raises the error of an actor that failed at once, not when all others are ready.
            addresses |= zip(ready.values(), wait_for(ready, self.left(), "starting"), strict=True)
            names = ", ".join(waiting.values()) or "nothing more"
            print(f"{time.monotonic() - self._started:4.0f} s: waiting for {names}", flush=True)
        if waiting:
            raise ClusterError(
                f"{', '.join(waiting.values())}: not ready within cluster.start_timeout ({seconds:g} s): raise it if "
                f"they only take longer; their output is in Ray's logs, worker-*"
            )
        return {name: addresses[name] for name in handles}


def _start_actors(reservation: _Reservation, model_path: str, images: StoredImages) -> Cluster:
    config = reservation.config
    learners, generators, reward = plan_actors(config)
    # `.remote` returns at once, so all actors start, import and load at the same time.
    generator_handles = reservation.start_generators(model_path, images)
    if config.shares_gpus:
        # An engine measures free memory at its start, so it must be the first. The learner loads into the memory that a
        # sleeping engine frees.
        reservation.wait_until_ready(generator_handles)
        ActorGroup(generator_handles, reservation.left()).call_all("sleep")
    learner_handles = {
        name: ray.remote(Learner)
        .options(**reservation.options(name, learners, {}))
        .remote(model_path, config, rank, max(1, int(learners.cpus)), images)
        for rank, name in enumerate(learners.names)
    }
    reward_handles = {
        name: ray.remote(Scorer)
        .options(**reservation.options(name, reward, QUIET_GET))
        .remote(config.rewards, config.scoring, images)
        for name in reward.names
    }
    # Where Ray placed an actor is known only now, and may change with a restart: no constructor gets an address.
    addresses = reservation.wait_until_ready(learner_handles | generator_handles | reward_handles)
    if len(set(addresses.values())) > 1:
        print(f"the actors were started on\n{by_host(addresses)}", flush=True)
    # From here on a call may take a whole step; until now the deadline of the start applied.
    timeout = config.cluster.step_timeout
    members = Learners(learner_handles, timeout)
    transfer = hardware(config.cluster.device, config.cluster.dtype, config.shares_gpus).transfer
    receivers = ActorGroup(generator_handles, timeout, WEIGHTS)
    weights = WeightSync(members, receivers, transfer, max(1, int(generators.gpus)))
    cluster = Cluster(
        Generators(generator_handles, timeout, config.generators.max_concurrent, weights.verify),
        RewardActor(reward_handles, timeout),
        members,
        weights,
        config,
    )
    cluster.join(addresses, reservation.left())
    return cluster
