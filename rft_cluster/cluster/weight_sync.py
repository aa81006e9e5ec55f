"""Weight transfer from learners to generators. The driver calls both ends; neither knows the other.

    driver                                learner ranks                     each generator
    connect    offer_weights -----------> a memory, or a port
               connect_weights ---------> meets ............ NCCL ......... init_weight_transfer_engine
    publish(v) publish_weights ---------> writes the memory
               load_weights(v) -----------------------------------------> maps and loads it, serves version v
                 on GPUs of their own both at once: a broadcast by NCCL
                 on a shared GPU: start, publish (its client forwards vLLM's payloads), finish
    verify     weight_digests ----------> digests of the sent tensors
               verify_weights(v, digests) -------------------------------> compares them with the received tensors
    wait       until the verification has finished

Verification is asynchronous: it runs while generation goes on, and generators return no group before it has finished.
Until then the learners must not write to the memory, so the next `publish` first waits for it. `publish` does not start
it: whoever waits for completions does, after their dispatch. Otherwise prompts would travel behind its calls, one an
actor.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rft_cluster.cluster.handles import ActorGroup, failure, raise_if_lost, wait_for
from rft_cluster.common.errors import ClusterError, UserError, WeightTransferError
from rft_cluster.messages import WeightRecord
from rft_cluster.weights.digests import added_up, combined_digest
from rft_cluster.weights.vllm_senders import nccl_init_infos


@dataclass(frozen=True)
class _Verification:
    """The calls in flight that verify an update: `sent` return the senders' digests, `arrived` compare them."""

    version: int
    sent: Mapping[ray.ObjectRef, str]
    arrived: Mapping[ray.ObjectRef, str]


class WeightSync:
    """See the module."""

    def __init__(self, learners: ActorGroup, generators: ActorGroup, transfer: str, tensor_parallel: int) -> None:
        """
        Args:
            generators: with their own threads for weight calls (see `actors.GENERATOR_CALLS`).
            transfer: `Hardware.transfer`.
            tensor_parallel: workers of each generator.
        """
        self._learners, self._generators = learners, generators
        self._transfer, self._tensor_parallel = transfer, tensor_parallel
        self._connected = False
        self._published: int | None = None  # a version whose verification has not been started
        self._verification: _Verification | None = None
        self.held: dict[str, int] = {}
        """The version that each generator was last verified to hold, by the actor's name."""
        self.updates, self.seconds, self.bytes = 0, 0.0, 0
        """Of all calls of `publish`: number, seconds without a verification, bytes that the generators received."""

    def connect(self, addresses: Mapping[str, str]) -> None:
        """Connect both ends. `addresses`: actor's name -> its host's address; the caller keeps them current."""
        self._addresses = addresses
        self._connect()

    def _connect(self) -> None:
        sender = self._addresses[self._learners.names[0]]
        self._elsewhere = [self._addresses[name] != sender for name in self._generators.names]
        count = len(self._generators)
        offer = self._learners.call_all("offer_weights", count * self._tensor_parallel)[0]
        self._update, self._nbytes = offer.update, offer.nbytes
        infos = [offer.init] * count
        if self._transfer == "nccl":
            infos = nccl_init_infos(offer.init, [self._tensor_parallel] * count)
        forward = partial(self._generators.call_all, "update_weights") if offer.update is None else None
        # Start both calls at once: in an NCCL group neither end returns before the other has joined.
        ends = self._generators.begin_each("init_weight_transfer_engine", [(info,) for info in infos])
        self._meet(ends | self._learners.begin_all("connect_weights", forward), "connecting")
        self._connected = True

    def _meet(self, calls: Mapping[ray.ObjectRef, str], doing: str) -> None:
        """Wait for calls of learners and generators that need each other.

        Raises:
            ClusterError: one failed. With NCCL it names all as lost: nobody can leave a collective whose peer is gone.
        """
        try:
            wait_for(calls, self._learners.timeout, doing)
        except (ClusterError, RayTaskError) as error:
            # vLLM raises NCCL's errors as RuntimeError.
            broken = isinstance(error, ClusterError) or type(error.cause) is RuntimeError
            if self._transfer == "nccl" and broken:
                raise ClusterError(_first_line(error), [*self._learners.names, *self._generators.names]) from error
            raise

    def _load(self, version: int) -> None:
        """Have the generators load the weights from the learners' memory.

        Raises:
            ClusterError: one failed. It counts as lost: vLLM is left in the middle of a layer-wise reload, and would
                take what is sent again on top of it. Or the learner died whose bytes it waited for.
        """
        loads = self._loads(version)
        calls = self._generators.begin_each("load_weights", loads)
        try:
            wait_for(calls, self._generators.timeout, "load_weights")
        except (WeightTransferError, OSError, UserError, RayTaskError) as error:  # UserError: out of memory
            failed = [name for call, name in calls.items() if failure(call)]
            raise ClusterError(f"{', '.join(failed)} did not load weights: {_first_line(error)}", failed) from error
        except ClusterError as error:
            # A call fails with the one that makes its argument, and Ray's error is the same as if its own actor died.
            sender = self._learners.names[0]
            raise_if_lost({data: sender for *_, data in loads if data is not None}, "weight_bytes", error)
            raise

    def reconnect(self, lost: Collection[str] = (), verified: bool = True) -> None:
        """Connect anew before the next update: there are other learners or generators.

        Args:
            lost: generators that have nothing to verify any more.
            verified: finish the verification of the last update first. Without it, that update counts for nothing.
        """
        self._connected = False
        if not verified:
            self._verification = self._published = None
        elif old := self._verification:
            arrived = {call: name for call, name in old.arrived.items() if name not in lost}
            self._verification = replace(old, arrived=arrived)

    def publish(self, version: int) -> None:
        """Bring every generator to the learners' weights. They may generate when this returns; see `verify`.

        Raises:
            WeightTransferError: the previous update did not verify, or this one failed.
        """
        self.wait()
        if not self._connected:
            self._connect()
        learners, generators = self._learners, self._generators
        began = time.monotonic()
        match self._transfer:
            case "shared_memory":
                learners.call_all("publish_weights")
                self._load(version)
            case "nccl":
                # Start the receive first. If one end fails, stop waiting for both: the other would hang in NCCL.
                ends = generators.begin_each("load_weights", self._loads(version))
                self._meet(ends | learners.begin_all("publish_weights"), "publish_weights")
            case _:
                generators.call_all("start_weight_update")
                learners.call_all("publish_weights")
                generators.call_all("finish_weight_update", version)
        self._published = version
        self.updates += 1
        self.seconds += time.monotonic() - began
        self.bytes += self._nbytes * len(generators)

    def doing(self) -> dict[str, str]:
        """What each generator is doing with weights; see `ActorGroup.doing`."""
        return self._generators.doing()

    def verify(self) -> dict[ray.ObjectRef, str]:
        """Start the verification of the last published weights, unless it was started.

        Returns the learners' calls that it waits for, if it has not finished. If one of them fails, the generators are
        never asked to verify.
        """
        if self._published is not None:
            version, self._published = self._published, None
            sent = self._learners.begin_all("weight_digests")
            arrived = self._generators.begin_all("verify_weights", version, *sent)
            self._verification = _Verification(version, sent, arrived)
        if self._verification is None:
            return {}
        return {call: f"{name} (digests)" for call, name in self._verification.sent.items()}

    def wait(self) -> None:
        """Verify the last published weights, and wait until they are verified on all generators.

        Raises:
            WeightTransferError: a generator received other bytes or names than were sent.
        """
        self.verify()
        if self._verification is None:
            return
        version = self._verification.version
        sent = wait_for(self._verification.sent, self._learners.timeout, "weight_digests")
        arrived = self._verification.arrived
        answers = wait_for(arrived, self._generators.timeout, "verify_weights")
        records = dict(zip(arrived.values(), answers, strict=True))
        check_records(records, version, combined_digest(added_up(sent)))
        self.held = {name: record.version for name, record in records.items()}
        self._verification = None  # a failed one stays, so that later calls raise again

    def _loads(self, version: int) -> Sequence[tuple[Any, ...]]:
        """The arguments of each generator's `load_weights`.

        Generators on other hosts cannot map the memory. Its contents reach them through Ray's object store, once for
        each host, without passing through this process.
        """
        data = None
        if self._transfer == "shared_memory" and any(self._elsewhere):
            data = self._learners.handles[0].weight_bytes.remote()
        return [(self._update, version, data if elsewhere else None) for elsewhere in self._elsewhere]


def _first_line(error: Exception) -> str:
    """Without an actor's traceback, which is in its log."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause).partition("\n")[0]


def check_records(records: Mapping[str, WeightRecord], version: int, digest: int) -> None:
    """Check that all generators serve the weights that were sent.

    Args:
        records: by the generator's name.
        digest: combined digest of the sent tensors.

    Raises:
        WeightTransferError: a generator reports another version, received other bytes, or holds other parameters
            than its peers.
    """
    first = next(iter(records), "")
    for name, record in records.items():
        if record.version != version:
            raise WeightTransferError(f"{name} serves version {record.version} instead of {version}")
        if record.received != digest:
            raise WeightTransferError(f"{name} received other weights for version {version} than were sent")
        if record.loaded != records[first].loaded:
            raise WeightTransferError(f"{first} and {name} hold different parameters for version {version}")
