"""The learners' end of the weight transfer, and the proof that it arrived. The other end is `receivers.py`.

    learner ranks                          client (calls all generators)       each generator's engine
    tensors: shared memory --------------> load_weights(..., version) -------> loads and serves them
             NCCL / CUDA IPC ------------> start, update_weights(...) -------> loads them
                                           finish_weight_update(version) ----> serves them, and may generate
    digests of what was sent ------------> prove_weights(version, digests) --> compares with what it received;
                                                                               until they agree no group leaves it

The proof is off the clock: through shared memory it runs beside generation, and the memory belongs to the
generators until it is in. No update begins before that.

The interface is vLLM's: a sender has `trainer_init` and `send_weights` and drives a client of four methods. For
GPUs the sender is vLLM's own NCCL engine, fed by `PolicyWeights`, which casts the FP32 masters to BF16 (vLLM's
`ModuleSource` would ship the masters). For CPUs it is ours: every rank casts its own shard straight into memory
that the generators map; as it is all there before they load, one call to each is enough.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch.distributed as dist

from rft_cluster.model.policy import PolicyModel
from rft_cluster.weights.client import VersioningClient, WeightClient, WeightSender
from rft_cluster.weights.shared_memory import SharedMemorySender
from rft_cluster.weights.source import PolicyWeights


class WeightBroadcast:
    """One learner rank's part in sending weights. Every rank makes one and calls `send` at the same time."""

    def __init__(self, policy: PolicyModel, make_sender: Callable[..., WeightSender], client: WeightClient) -> None:
        self._weights = PolicyWeights(policy)
        self._client = VersioningClient(client)
        self._sender = make_sender(self._client, self._weights)
        self._thread = ThreadPoolExecutor(1, "proof")
        self._proof: Future[None] | None = None

    def send(self, version: int) -> None:
        """Bring all generators to `version`. They may generate when this returns; see `wait` for the proof.

        Raises:
            WeightTransferError: the update before this one was never proved, or this one failed.
        """
        self.wait()
        self._client.version = version
        self._sender.send_weights()
        if isinstance(self._sender, SharedMemorySender):
            self._proof = self._thread.submit(self._sender.prove)
        else:
            digests = self._weights.digests()
            if dist.get_rank() == 0:
                self._client.prove(digests)

    def wait(self) -> None:
        """Wait for the proof of the last update: from then on the memory that it went through is ours again.

        Raises:
            WeightTransferError: a generator found other bytes or names than were sent.
        """
        if self._proof:
            self._proof.result()

    def close(self) -> None:
        self._thread.shutdown()  # a proof that failed has told the generators' callers, who are gone
        self._sender.shutdown()
