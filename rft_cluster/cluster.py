"""Ray: placement, actors, fan-out, deadlines. The only file that imports it.

    with start_cluster(config, model_path) as cluster:
        cluster.broadcast_weights(version=0)
        groups = cluster.generators.generate(prompts, sampling, version=0)

Roles are plain classes; here they become actors with names that the dashboard shows: generator-0, reward,
learner-0. Every wait has a deadline.
"""

import logging
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rft_cluster.batching import split_work
from rft_cluster.checkpoint import publish, temporary_folder
from rft_cluster.config import ClusterSection, Config
from rft_cluster.errors import UserError
from rft_cluster.generator import ENVIRONMENT as GENERATOR_ENVIRONMENT
from rft_cluster.generator import Generator, Sampling
from rft_cluster.hardware import hardware
from rft_cluster.learner import Learner
from rft_cluster.messages import Group, Prompt, Reward, TrainingSample, WeightRecord
from rft_cluster.plan import ActorPlan, NodeResources, check_fits, plan_actors
from rft_cluster.scorer import Scorer
from rft_cluster.weights import nccl_init_infos

# Calls to a generator that may be under way at once: generation, and weights beside it.
GENERATOR_CALLS = 8
ADDRESS_TIMEOUT = 10.0  # seconds


class ClusterError(RuntimeError):
    """An actor died or did not answer in time; the message names it and the call."""


def wait_for(calls: dict[str, Any], timeout: float, doing: str) -> list[Any]:
    """The results of `calls` (actor name -> reference), in their order.

    Raises:
        ClusterError: an actor died, or the deadline passed. What an actor itself raised comes as it is.
    """
    try:
        return ray.get(list(calls.values()), timeout=timeout)
    except GetTimeoutError as error:
        ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=0)
        late = [name for name, reference in calls.items() if reference not in ready]
        raise ClusterError(f"{', '.join(late)}: no answer to '{doing}' within {timeout:g} s") from error
    except RayActorError as error:
        raise ClusterError(f"an actor died while '{doing}': {error}") from error


class ActorGroup:
    """The actors of one role."""

    def __init__(self, handles: dict[str, ActorHandle], timeout: float) -> None:
        self._handles = handles
        self._timeout = timeout

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def handles(self) -> list[ActorHandle]:
        return list(self._handles.values())

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every actor with the same arguments; the answers in the actors' order."""
        return self.call_each(method, [arguments] * len(self))

    def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every actor, each with its own arguments."""
        calls = {
            name: getattr(handle, method).remote(*own)
            for (name, handle), own in zip(self._handles.items(), arguments, strict=True)
        }
        return wait_for(calls, self._timeout, method)


class Generators(ActorGroup):
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Groups in the order of `prompts`, which are dealt to the generators in turns."""
        shares = [prompts[index :: len(self)] for index in range(len(self))]
        answers = self.call_each("generate", [(share, sampling, version) for share in shares])
        groups: list[Group | None] = [None] * len(prompts)
        for index, answer in enumerate(answers):
            groups[index :: len(self)] = answer
        return [group for group in groups if group is not None]


class RewardActor(ActorGroup):
    def score(self, groups: Sequence[Group]) -> list[list[Reward]]:
        return self.call_all("score", groups)[0]


class Learners(ActorGroup):
    def update(self, samples: Sequence[TrainingSample], step: int, updates: int, micro_batch: int) -> dict[str, float]:
        """One step's optimizer updates on all ranks; sums over all their tokens. No samples: no update."""
        if not samples:
            return {}
        work = split_work(samples, len(self), updates, micro_batch)
        answers = self.call_each("update", [(share, step) for share in work])
        same = {name: answers[0].pop(name) for name in ("grad_norm", "learning_rate", "skipped")}
        return {name: sum(answer[name] for answer in answers) for name in answers[0]} | same

    def save_checkpoint(self, folder: Path) -> Path:
        """Write a checkpoint's tensors to a temporary folder and return it; `checkpoint.publish` completes it."""
        temporary = temporary_folder(folder)
        self.call_all("save_checkpoint", str(temporary))
        return temporary

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        temporary = temporary_folder(folder)
        self.call_all("export", str(temporary))
        publish(temporary, folder)


class GeneratorsClient:
    """The generators as the sending learner sees them (see `weights.WeightClient`)."""

    def __init__(self, generators: Generators, tensor_parallel: int) -> None:
        self._generators = generators
        self._tensor_parallel = tensor_parallel

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [init_info] * len(self._generators)
        if "rank_offset" in init_info:
            infos = nccl_init_infos(init_info, [self._tensor_parallel] * len(self._generators))
        self._generators.call_each("init_weight_transfer_engine", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        self._generators.call_all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._generators.call_all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> list[WeightRecord]:
        return self._generators.call_all("finish_weight_update", weight_version)


class Cluster:
    """All actors of a run."""

    def __init__(self, generators: Generators, reward: RewardActor, learners: Learners) -> None:
        self.generators, self.reward, self.learners = generators, reward, learners

    def broadcast_weights(self, version: int) -> None:
        """Bring every generator to the learners' weights, proved, under `version`."""
        self.learners.call_all("send_weights", version)


def connect(config: ClusterSection, cpus: float) -> str:
    """Join the cluster that is configured or that RAY_ADDRESS names; without one, start one on this machine.

    Returns one line for people: where to watch it.

    Raises:
        UserError: the address does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors without GPUs keep seeing none, as Ray will do by default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # It only says, on every start, that tokens are on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address and ":" in address:
        # Ray would ask a silent address for minutes.
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=ADDRESS_TIMEOUT).close()
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at {address!r}: {error}") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    try:
        if address:
            url = ray.init(address=address, **quiet).dashboard_url
            return f"Ray cluster at {address}, dashboard http://{url}"
        # An actor's CPUs are a promise about threads; a laptop with one core still runs the demo.
        available = max(os.cpu_count() or 1, math.ceil(cpus))
        url = ray.init(num_cpus=available, include_dashboard=True, dashboard_host="127.0.0.1", **quiet).dashboard_url
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {address!r}: {error}") from error
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)  # Ray creates it readable for everybody
    return f"Ray started here, dashboard http://{url} (it asks for a token: ray get-auth-token)"


def cluster_nodes() -> list[NodeResources]:
    return [
        NodeResources(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_cluster(config: Config) -> str:
    """Hold the plan against a running cluster and start nothing. Returns one line for people.

    Raises:
        UserError: it does not answer, or cannot hold the actors.
    """
    where = connect(config.cluster, cpus=0)
    try:
        nodes = cluster_nodes()
        check_fits(config, nodes)
        return f"{where}: its {len(nodes)} node(s) can hold the run"
    finally:
        ray.shutdown()


@contextmanager
def start_cluster(config: Config, model_path: str) -> Iterator[Cluster]:
    """Connect, place and start all actors, and stop them at the end.

    Raises:
        UserError: the cluster lacks resources, or what it has is taken by others.
        ClusterError: an actor did not become ready in time.
    """
    actors = plan_actors(config)
    print(connect(config.cluster, sum(role.count * role.cpus for role in actors)), flush=True)
    try:
        check_fits(config, cluster_nodes())
        deadline = time.monotonic() + config.cluster.start_timeout
        group = _reserve(config)
        with tempfile.TemporaryDirectory(prefix="rft_cluster_") as rendezvous:
            yield _start_actors(config, model_path, group, f"file://{rendezvous}/learners", deadline)
        remove_placement_group(group)
    finally:
        ray.shutdown()


def _reserve(config: Config) -> PlacementGroup:
    bundles = [
        {name: amount for name, amount in (("CPU", role.cpus), ("GPU", role.gpus)) if amount}
        for role in plan_actors(config)
        for _ in range(role.count)
        if role.cpus or role.gpus  # the reward actor asks for nothing and fits anywhere
    ]
    group = placement_group(bundles, strategy="PACK", name=f"rft-{config.run.name}")
    try:
        ray.get(group.ready(), timeout=min(60.0, config.cluster.start_timeout))
    except GetTimeoutError as error:
        free = ray.available_resources()
        remove_placement_group(group)
        raise UserError(
            f"the cluster is large enough, but its resources are taken: {bundles} are needed, "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free. Stop other jobs or wait."
        ) from error
    return group


def _environment(config: Config, cpus: float) -> dict[str, str]:
    """Environment of an actor's process, set before it starts."""
    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus))), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if config.cluster.device == "cpu" and openmp.is_file():
        # Without Intel's OpenMP runtime the CPU build of vLLM was seen to take 1.7 to 52 s for the same batch.
        environment |= {"LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "0"}
    return environment


def _start_actors(config: Config, model_path: str, group: PlacementGroup, rendezvous: str, deadline: float) -> Cluster:
    learners, generators, reward = plan_actors(config)
    devices = hardware(config.cluster.device)
    bundles = iter(range(group.bundle_count))

    def options(name: str, role: ActorPlan, environment: dict[str, str]) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "name": name,
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "runtime_env": {"env_vars": _environment(config, role.cpus) | environment},
        }
        if role.cpus or role.gpus:
            chosen["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, next(bundles))
        return chosen

    # One process on this host: gloo stays on loopback, and a file needs no listener.
    gloo = {"GLOO_SOCKET_IFNAME": "lo"} if config.cluster.device == "cpu" else {}
    threads = max(1, int(learners.cpus))
    learner_handles = {
        name: ray.remote(Learner)
        .options(**options(name, learners, gloo))
        .remote(model_path, config, rank, learners.count, rendezvous, threads)
        for rank, name in enumerate(learners.names)
    }
    generator_handles = {
        name: ray.remote(Generator)
        .options(max_concurrency=GENERATOR_CALLS, **options(name, generators, GENERATOR_ENVIRONMENT))
        .remote(model_path, config.model, config.generators, config.max_model_tokens, devices, config.run.seed)
        for name in generators.names
    }
    reward_handles = {
        name: ray.remote(Scorer).options(**options(name, reward, {})).remote(config.rewards) for name in reward.names
    }
    handles = learner_handles | generator_handles | reward_handles
    ready = {name: handle.__ray_ready__.remote() for name, handle in handles.items()}
    wait_for(ready, max(1.0, deadline - time.monotonic()), "starting")

    timeout = config.cluster.step_timeout
    cluster = Cluster(
        Generators(generator_handles, timeout),
        RewardActor(reward_handles, timeout),
        Learners(learner_handles, timeout),
    )
    client = GeneratorsClient(cluster.generators, max(1, int(generators.gpus)))
    cluster.learners.call_all("connect_generators", client, {})
    return cluster
