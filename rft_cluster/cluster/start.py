"""Connect to Ray, reserve resources, start and stop the actors.

    with start_cluster(config, model_path, task.dataset.images) as cluster:
        cluster.broadcast_weights(version=0)
        groups = cluster.generators.generate(prompts, sampling, version=0)

Every wait has a deadline.
"""

import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import RayError

from rft_cluster.cluster import DASHBOARD_LIMIT
from rft_cluster.cluster.actors import WEIGHTS, Actors
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.gpus import HIDE_GPUS
from rft_cluster.cluster.handles import ActorGroup, Learners, RewardActor
from rft_cluster.cluster.images import StoredImages
from rft_cluster.cluster.leftovers import without_leftovers
from rft_cluster.cluster.machine import makes_token, token_file
from rft_cluster.cluster.nodes import addresses_of, check_gpus, check_shared, cluster_nodes, everywhere, fetch_model
from rft_cluster.cluster.placement import bundles, by_host, describe_placement, place, split_needed
from rft_cluster.cluster.recovery import Again, Recovery, never
from rft_cluster.cluster.reservation import reserve, taken
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.common import stopping
from rft_cluster.common.errors import Taken, Unavailable, UserError
from rft_cluster.common.hardware import hardware
from rft_cluster.common.network import reach
from rft_cluster.config import ClusterSection, Config

# Seconds of a start of Ray, which takes four on a machine that does nothing else. Of these 150 are for the dashboard
# (see `cluster/__init__.py`).
ANSWERS_WITHIN = 300.0
# Arguments: seconds, a message, and the process to end. Its input ends with the wait, or with that process.
WATCH = """
timeout "$0" cat
[ $? = 124 ] && { echo "$1" >&2; kill -KILL "$2"; }
"""
LOGS = "Ray's logs are in session_latest/logs of the folder ray in RAY_TMPDIR, TMPDIR or /tmp"
# Words in the messages of Ray's core about a missing or wrong token.
TOKEN = re.compile(r"InvalidAuthToken|Unauthenticated|auth\w* token|token auth", re.IGNORECASE)


def connect(config: ClusterSection, cpus: float) -> str:
    """Join the cluster of the configuration or of RAY_ADDRESS; without one, start Ray on this machine.

    Returns one line for the user with the dashboard's address.

    Raises:
        UserError: the address does not answer, the cluster cannot be joined, or Ray cannot start here.
        Unavailable: Ray starts too slowly here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(HIDE_GPUS, "1")
    # If several actors fail, the first error is raised. Without this, Ray prints the others' tracebacks as well.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # This logger only says, on every start, that tokens are on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # And this one prints how full the object store is, whenever an answer was lost with its node.
    logging.getLogger("ray._raylet").setLevel(logging.ERROR)
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address and ":" in address:
        # Ray would wait minutes for an unreachable address.
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            reach(host, port)
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at {address!r}: {error}") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address:
        with _ended_after(ANSWERS_WITHIN):
            return f"Ray cluster at {address}, dashboard http://{_join(address, quiet)}"
    # Tell Ray as many CPUs as the plan needs: they only determine threads, and one core still runs the demo.
    available = max(os.cpu_count() or 1, math.ceil(cpus))
    # "local": do not join another cluster that happens to run on this machine.
    local: dict[str, Any] = {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
    # Ray hands the path of Python to a shell without quotes: in a folder with a space no actor would start.
    if (python := shlex.quote(sys.executable)) != sys.executable:
        local["runtime_env"] = {"py_executable": python}
    _keep_token_to_oneself()
    url = _start(num_cpus=available, **local, **quiet)
    return f"Ray started here, dashboard http://{url} (it asks for a token: ray get-auth-token)"


def _start(**options: Any) -> str:
    """Start Ray on this machine. Returns the dashboard's address. Raises errors as `connect`."""
    began = time.monotonic()
    try:
        with without_leftovers(), _ended_after(ANSWERS_WITHIN):
            return _init(**options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise UserError(f"Ray could not start on this machine: {error}\n{LOGS}") from error
    except Exception as error:
        if type(error) is not Exception:  # which Ray raises where one of its processes does not start
            raise
        said = str(error).strip()[-1000:]
        if time.monotonic() - began < float(os.environ[DASHBOARD_LIMIT]):
            raise UserError(f"Ray could not start on this machine: {said}\n{LOGS}") from error
        raise Unavailable(
            f"Ray's dashboard did not start in time, as on a busy machine: start the command again. {LOGS}\n{said}"
        ) from error


def _keep_token_to_oneself() -> None:
    """Ray writes a new token to a file that all users may read, unless it is there before, be it empty."""
    token = token_file()
    if makes_token():
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch(mode=0o600)
    if token.exists():
        token.chmod(0o600)  # one that was made otherwise


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


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process by force if the context takes longer: SIGKILL, after which a scheduler starts a run again.

    Ray's core waits without a limit for a node's answer, in which no thread and no signal handler of Python gets its
    turn, so another process has to watch. Seen once, when two Rays started together on two busy cores.
    """
    said = f"error: Ray has not answered within {seconds:g} s: start the command again. {LOGS}"
    command = ["/bin/sh", "-c", WATCH, str(seconds), said, str(os.getpid())]
    # In a session of its own: Ctrl-C, and the signal of a terminal that closes, are for this process.
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        watch.communicate()  # ends its input


def _init(**options: Any) -> str:
    """Call `ray.init` and restore the signal handlers that it replaces. Returns the dashboard's address."""
    try:
        url = ray.init(**options).dashboard_url
    except SystemExit as end:  # raised by Ray's own signal handler
        raise stopping.stop_for(signal.SIGTERM) from end
    stopping.take_signals()
    return url


def describe_cluster(config: ClusterSection) -> str:
    """A line about a running cluster. Nothing is started. Raises UserError as `connect`."""
    where = connect(config, cpus=0)
    try:
        nodes = cluster_nodes()
    finally:
        ray.shutdown()
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{where}: {len(nodes)} node{'s' * (len(nodes) != 1)} with {cpus:g} CPUs and {gpus:g} GPUs"


def check_cluster(config: Config, patience: float = 0) -> str:
    """Check the plan against a running cluster without starting anything. Returns lines for the user.

    Args:
        patience: seconds to wait for resources that others hold. With 0, taken resources are only reported.

    Raises:
        UserError: the cluster does not answer, or is too small.
        Taken: its resources are still taken after `patience`.
    """
    where = connect(config.cluster, cpus=0)
    try:
        nodes, deadline = cluster_nodes(), time.monotonic() + patience
        wanted, _ = split_needed(config, bundles(config))
        lines = [f"{where}: it can hold the run", describe_placement(config, nodes)]
        if any(bundle.gpus for bundle in wanted):
            check_gpus({node.node_id: node.address for node in place(config, nodes)})
        while (missing := taken(wanted)) and time.monotonic() < deadline:
            time.sleep(1)
        if missing and patience:
            raise Taken(missing)
        return "\n".join([*lines, missing] if missing else lines)
    finally:
        ray.shutdown()


@contextmanager
def start_cluster(
    config: Config, model_path: str, images: Mapping[str, bytes], again: Again = never
) -> Iterator[Cluster]:
    """Connect, start all actors, and stop them at the end of the context.

    Args:
        images: of every prompt, by SHA-256.
        again: see `recovery.Again`.

    Raises:
        UserError: the cluster lacks resources, or others hold them.
        ClusterError: an actor did not become ready in time.
    """
    with _reserved(config, True, model_path, images) as actors:
        cluster = start_actors(actors, again)
        with closing(cluster.generators):
            yield cluster


@contextmanager
def start_generators(config: Config, model_path: str, images: Mapping[str, bytes]) -> Iterator[Generators]:
    """Start only the generators, with the weights in `model_path` as version 0. Raises as `start_cluster`."""
    with _reserved(config, False, model_path, images) as actors:
        handles = actors.start_generators()
        actors.wait_until_ready(handles)
        with closing(Generators(handles, config.cluster.step_timeout, config.generators.max_concurrent)) as generators:
            generators.call_all("serve_checkpoint", 0)
            yield generators


@contextmanager
def _reserved(config: Config, training: bool, model_path: str, images: Mapping[str, bytes]) -> Iterator[Actors]:
    wanted = bundles(config, training)
    model_path = everywhere(model_path)
    print(connect(config.cluster, sum(bundle.cpus for bundle in wanted)), flush=True)
    try:
        place(config, cluster_nodes(), training)  # refuses at once a run that these nodes can never hold
        reservation = reserve(config, wanted)
        if config.cluster.joins:  # on this machine both are done before Ray starts
            _prepare(addresses_of(reservation.groups), config, model_path, training)
        # The driver keeps the images' references, for actors that start afresh.
        yield Actors(config, reservation, model_path, StoredImages(images))
        reservation.give_back()
    finally:
        ray.shutdown()


def _prepare(nodes: Mapping[str, str], config: Config, model_path: str, training: bool) -> None:
    """What nodes need before actors start there and their deadline runs. `nodes`: Ray's node id -> address."""
    if config.cluster.device == "cuda":
        check_gpus(nodes)
    files, model = [], Path(model_path, "config.json")
    if Path(model_path).is_dir():
        beside_runs = model.is_relative_to(config.run.folder.absolute())  # as the small model
        files.append(("run.folder" if beside_runs else "model.path", model))
    with ExitStack() as stack:
        if training and config.run_folder.is_dir():
            probe = stack.enter_context(
                tempfile.NamedTemporaryFile(dir=config.run_folder, prefix=".seen-by-all-nodes-")
            )
            files.append(("run.folder", Path(probe.name)))
        if files:
            check_shared(nodes, files)
    fetch_model(nodes, model_path, config.cluster.step_timeout)


def start_actors(actors: Actors, again: Again) -> Cluster:
    """Start the actors of all roles and connect them."""
    config = actors.config
    generator_handles = actors.start_generators()
    # Their room may come with a node that joins the cluster later.
    beyond = [name for bundle in split_needed(config, bundles(config))[1] for name in bundle.actors]
    later = {name: generator_handles[name] for name in beyond if not actors.is_placed(name)}
    generator_handles = {name: handle for name, handle in generator_handles.items() if name not in later}
    if config.shares_gpus:
        # An engine measures free memory at its start, so it must be the first. The learner loads into the memory that a
        # sleeping engine frees.
        actors.wait_until_ready(generator_handles)
        ActorGroup(generator_handles, actors.left()).call_all("sleep")
    learner_handles, reward_handles = actors.start_learners(), actors.start_reward()
    # Where Ray placed an actor is known only now, and differs for a fresh one: no constructor gets an address.
    addresses = actors.wait_until_ready(learner_handles | generator_handles | reward_handles)
    if len(set(addresses.values())) > 1:
        print(f"the actors were started on\n{by_host(addresses)}", flush=True)
    # From here on a call may take a whole step; until now the deadline of the start applied.
    timeout = config.cluster.step_timeout
    learners, reward = Learners(learner_handles, timeout), RewardActor(reward_handles, timeout)
    # Weights go to one group and prompts to the other, which a fresh generator joins later.
    receivers = ActorGroup(dict(generator_handles), timeout, WEIGHTS)
    transfer = hardware(config.cluster.device, config.cluster.dtype, config.shares_gpus).transfer
    weights = WeightSync(learners, receivers, transfer, max(1, int(config.generators.gpus)))
    generators = Generators(generator_handles, timeout, config.generators.max_concurrent, weights.verify)
    recovery = Recovery(actors, generators, receivers, reward, learners, weights, addresses, again)
    for name, handle in later.items():
        recovery.expect(name, handle)
    learners.join(addresses, actors.left(), actors.grows)
    weights.connect(addresses)
    return Cluster(generators, reward, learners, weights, config, recovery)
