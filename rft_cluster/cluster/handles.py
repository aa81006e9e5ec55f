"""The driver's handles on groups of Ray actors: calls to all, deadlines, and errors that name the actor.

The dispatch of prompts to generators is in `rollouts.py`.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from rft_cluster.cluster.cause import cause_of
from rft_cluster.cluster.ending import end
from rft_cluster.common.errors import ClusterError, EngineFailed, UserError, WeightTransferError
from rft_cluster.common.files import unfinished, write_json
from rft_cluster.common.reduce import reduced
from rft_cluster.common.text import shown
from rft_cluster.learner.packing import split_work
from rft_cluster.messages import LearnerStats, TrainingSample

# Of an actor; of an answer that was still on a node when it died; of a task, or of the node that it is bound to; of
# either, ended by Ray for memory.
LOSSES = (
    RayActorError,
    ObjectLostError,
    NodeDiedError,
    WorkerCrashedError,
    TaskUnschedulableError,
    OutOfMemoryError,
)
PEERS = 5.0  # seconds for the news of a death to arrive behind the errors that it caused
NODE = 75.0  # the same for the death of a node: Ray's head declares one dead 64 s after it was cut off
LOOK = 1.0  # seconds between two calls of `ActorGroup.meanwhile`
CUT = re.compile(r"by peer|remote process exited")  # gloo and NCCL about a connection to another rank
NAMED = 8  # prompts in one warning
# The names of calls in Ray's dashboard and timeline: the phase in which they belong. The class comes first, because Ray
# makes the title of the process of it, by which `ending.py` knows the process.
TASKS = {
    "generate": "Generator.generate",
    "score": "Scorer.score",
    "update": "Learner.learn",
    "publish_weights": "Learner.transfer",
    "load_weights": "Generator.transfer",
    "weight_digests": "Learner.verify",
    "verify_weights": "Generator.verify",
}
MISTAKE = f"\n{UserError.__module__}.{UserError.__qualname__}: "  # in Ray's report, before the message


def nothing() -> None:
    """The `meanwhile` of a wait in which there is nothing else to do."""


def wait_for(
    calls: Mapping[ray.ObjectRef, str], timeout: float, doing: str, meanwhile: Callable[[], None] = nothing
) -> list[Any]:
    """The results of `calls` (reference -> actor's name), in their order. `meanwhile`: called every second.

    Raises:
        UserError: an actor's constructor raised it.
        ClusterError: an actor died, or the deadline passed. Exceptions of the actor's own code are raised unchanged.
    """
    if not calls:
        return []  # a client without calls would first look for a Ray cluster, or start one
    try:
        return _get(list(calls), timeout, meanwhile)
    except GetTimeoutError as error:
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        late = dict.fromkeys(name for reference, name in calls.items() if reference not in ready)
        message = f"{', '.join(late)}: no answer to '{doing}' within {timeout:g} s"
        raise ClusterError(message, map(actor_of, late)) from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError | OSError | WeightTransferError):
            raise error.cause from error  # the user sees the message, without the actor's traceback
        if isinstance(error.cause, EngineFailed):
            broken = [name for call, name in calls.items() if isinstance(failure(call), EngineFailed)]
            raise ClusterError(f"{', '.join(broken)}: {error.cause}", map(actor_of, broken)) from error
        # A rank that dies in a collective fails its peers first, whose errors say nothing of it.
        ray.wait(list(calls), num_returns=len(calls), timeout=PEERS)
        cut = CUT.search(str(error))
        if cut:
            _wait_for_a_death(calls)
        raise_if_lost(calls, doing, error)
        if cut:
            names = list(dict.fromkeys(calls.values()))
            message = f"{', '.join(names)}: a connection between them broke while '{doing}', and none of them died"
            raise ClusterError(message, map(actor_of, names)) from error
        raise
    except LOSSES as error:
        raise_if_lost(calls, doing, error)
        raise


def _get(calls: list[ray.ObjectRef], timeout: float, meanwhile: Callable[[], None]) -> list[Any]:
    end = time.monotonic() + timeout
    while meanwhile is not nothing and time.monotonic() + LOOK < end:
        with suppress(GetTimeoutError):
            return ray.get(calls, timeout=LOOK)
        meanwhile()
    return ray.get(calls, timeout=max(0.0, end - time.monotonic()))


def _wait_for_a_death(calls: Mapping[ray.ObjectRef, str]) -> None:
    deadline, waiting = time.monotonic() + NODE, list(calls)
    while waiting and time.monotonic() < deadline and not any(map(_death, calls)):
        _, waiting = ray.wait(list(calls), num_returns=len(calls), timeout=1)


def raise_if_lost(calls: Mapping[ray.ObjectRef, str], doing: str, error: Exception) -> None:
    """Raise ClusterError if one of the calls failed because an actor died. It names all that did.

    If an actor's constructor raised UserError, that is raised: another start would end in the same way.
    """
    lost = {name: death for reference, name in calls.items() if (death := _death(reference))}
    for death in lost.values():
        # Ray keeps only the text of the exception that ended a constructor.
        _, is_mistake, message = str(death).rpartition(MISTAKE)
        if isinstance(death, RayActorError) and death.actor_init_failed and is_mistake:
            raise UserError(message) from error
    if lost:
        causes = {cause_of(str(death)) for death in lost.values()}
        message = f"{', '.join(lost)} died while '{doing}': {'; '.join(sorted(causes))}"
        raise ClusterError(message, map(actor_of, lost)) from error


def actor_of(name: str) -> str:
    """The actor's own name, without what a call's name adds: "reward" of "reward (for generator-1)"."""
    return name.partition(" (")[0]


def _death(call: ray.ObjectRef) -> RayError | None:
    """The error of a call whose actor, or the actor of one of its arguments, died, or whose answer is lost."""
    error = failure(call)
    if isinstance(error, LOSSES):
        return error.cause if isinstance(error, RayTaskError) else error  # of an argument: Ray adds a traceback
    return None


def failure(call: ray.ObjectRef) -> RayError | None:
    """The error with which a call ended; None if it goes on, or has answered."""
    try:
        ray.get(call, timeout=0)
    except GetTimeoutError:
        return None
    except RayError as error:
        return error
    return None


def unanswered(calls: Sequence[ray.ObjectRef]) -> set[ray.ObjectRef]:
    """The calls that go on."""
    if not calls:
        return set()
    return set(ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)[1])


def named(handle: ActorHandle, method: str, threads: str = "") -> Any:
    """A method of an actor, whose calls have the name of their phase. `threads`: see `ActorGroup`."""
    options = {"name": TASKS[method]} if method in TASKS else {}
    if threads:
        options["concurrency_group"] = threads
    call = getattr(handle, method)
    return call.options(**options) if options else call


class ActorGroup:
    """The actors of one role."""

    def __init__(self, handles: dict[str, ActorHandle], timeout: float, threads: str = "") -> None:
        """
        Args:
            timeout: seconds that a call may take.
            threads: the actors' concurrency group for these calls, if not the default one.
        """
        self._handles = handles
        self._timeout = timeout
        self._threads = threads
        self._begun: dict[str, tuple[str, ray.ObjectRef]] = {}  # actor's name -> its last call
        self.meanwhile: Callable[[], None] = nothing
        """What the loop does every second while it waits for completions, or for an update."""

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def names(self) -> list[str]:
        return list(self._handles)

    @property
    def handles(self) -> list[ActorHandle]:
        return list(self._handles.values())

    @property
    def timeout(self) -> float:
        return self._timeout

    def kill(self) -> None:
        """End all actors, frozen ones too."""
        end(self._handles.values())

    def replace(self, handles: Mapping[str, ActorHandle]) -> None:
        """Take fresh actors in place of all."""
        self._handles = dict(handles)

    def add(self, name: str, handle: ActorHandle) -> None:
        self._handles[name] = handle

    def remove(self, name: str) -> None:
        """Drop an actor that is lost, and end it: it may be no more than frozen."""
        end([self._handles.pop(name)])

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every actor with the same arguments. Returns the answers in the actors' order."""
        return self.call_each(method, [arguments] * len(self))

    def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]], timeout: float | None = None) -> list[Any]:
        """Call a method of every actor, each with its own arguments."""
        return wait_for(self.begin_each(method, arguments), timeout or self._timeout, method)

    def begin_all(self, method: str, *arguments: Any) -> dict[ray.ObjectRef, str]:
        """Start the calls of `call_all` without waiting. Returns them for `wait_for`."""
        return self.begin_each(method, [arguments] * len(self))

    def begin_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> dict[ray.ObjectRef, str]:
        calls = {}
        for (name, handle), own in zip(self._handles.items(), arguments, strict=True):
            begun = named(handle, method, self._threads).remote(*own)
            calls[begun], self._begun[name] = name, (method, begun)
        return calls

    def doing(self) -> dict[str, str]:
        """What each actor is doing, for people: the name of its last call, or "idle" when that has been answered."""
        begun = {name: self._begun[name] for name in self.names if name in self._begun}
        waiting = unanswered([call for _, call in begun.values()])
        busy = {name: method.replace("_", " ") for name, (method, call) in begun.items() if call in waiting}
        return dict.fromkeys(self.names, "idle") | busy


class RewardActor(ActorGroup):
    def score(self, groups: ray.ObjectRef, completions: int) -> ray.ObjectRef:
        """Score groups in flight, as soon as they are finished. `completions`: of the whole step."""
        call = named(self.handles[0], "score").remote(groups, completions)
        self._begun[self.names[0]] = "score what is written", call
        return call


class Update:
    """A step's optimizer updates, finished or not."""

    def __init__(
        self,
        calls: Mapping[ray.ObjectRef, str],
        timeout: float,
        step: int,
        meanwhile: Callable[[], None] = nothing,
    ) -> None:
        """`calls`: each rank's, with its name."""
        self._calls, self._timeout, self._step, self._meanwhile = calls, timeout, step, meanwhile

    def wait(self) -> LearnerStats | None:
        """The combined figures of all ranks; None if there was nothing to learn from. A skipped update is said.

        Raises:
            ClusterError: a learner died, or did not answer in time.
            UserError: a weight is not finite now. Nothing has sent, saved or exported it yet.
        """
        if not self._calls:
            return None
        learned = reduced(wait_for(self._calls, self._timeout, "update", self._meanwhile))
        if learned.skipped:
            print(f"WARNING: {_skipped(self._step + 1, learned)}", flush=True)
        if not learned.finite_weights:
            # No ClusterError, after which the same update would be made again.
            raise UserError(
                f"step {self._step + 1}, with a learning rate of {learned.learning_rate:g}, made weights that are "
                f"infinite or not a number. None of them was sent or saved: the newest checkpoint is of a step before. "
                f"Begin again under another run.name with a lower optimizer.learning_rate or optimizer.max_grad_norm"
            )
        return learned


def _skipped(step: int, learned: LearnerStats) -> str:
    """One line: how many updates were left out, and on which prompts the loss was not finite."""
    line = f"step {step}: {learned.skipped} update{'s' * (learned.skipped > 1)} left out on all learners, because the "
    if not learned.not_finite:
        return f"{line}gradient was infinite or not a number, and the loss was finite"
    more = len(learned.not_finite) - NAMED
    names = ", ".join(map(shown, learned.not_finite[:NAMED])) + (f" and {more} more" if more > 0 else "")
    return f"{line}loss was infinite or not a number in the micro-batches with the prompts {names}"


class Learners(ActorGroup):
    def join(self, addresses: Mapping[str, str], timeout: float, grows: bool = False) -> None:
        """Make the ranks one process group.

        Rank 0 opens a port on its host, and the driver tells the others its number.

        Args:
            addresses: actor's name -> its host's address.
            grows: whether other hosts may join the cluster later.
        """
        own = [addresses[name] for name in self.names]
        others = None if grows else [address for name, address in addresses.items() if name not in self.names]
        first = {self.handles[0].offer_rendezvous.remote(own): self.names[0]}
        (rendezvous,) = wait_for(first, timeout, "offering a rendezvous")
        self.call_each("join", [(rendezvous, own, others)] * len(self), timeout)

    def start_update(
        self, samples: Sequence[TrainingSample], step: int, updates: int, micro_batch_tokens: int
    ) -> Update:
        """Start one step's optimizer updates on all ranks, or nothing without samples. Returns without waiting."""
        if not samples:
            return Update({}, self._timeout, step)
        work = split_work(samples, len(self), updates, micro_batch_tokens)
        calls = self.begin_each("update", [(share, step) for share in work])
        return Update(calls, self._timeout, step, self.meanwhile)

    def restore_checkpoint(self, folder: Path, updates: int, step: int) -> None:
        """Load a checkpoint of `step` on all ranks. `updates`: number of optimizer updates before it."""
        self.call_all("restore_checkpoint", str(folder.absolute()), updates, step)

    def export(self, folder: Path, files: Mapping[str, Any]) -> None:
        """Write the policy as a Hugging Face folder, with additional JSON `files` (name -> content)."""
        with unfinished(folder) as temporary:
            self.call_all("export", str(temporary.absolute()))
            for name, content in files.items():
                write_json(temporary / name, content)
