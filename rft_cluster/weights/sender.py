"""The learners' end of the weight transfer. The generators' end is `receivers.py`; the driver starts both.

Every learner rank has a sender. All ranks are called at the same time, in this order:

                   offer                            connect              send, once an update
    CPUs           a layout, the path of a memory   -                    each rank writes its shard into the memory
    GPUs (NCCL)    a port; names and shapes         forms the group      vLLM broadcasts from rank 0
    one shared     -                                -                    vLLM sends handles of its buffers, chunk by
    GPU (IPC)                                                            chunk, to `forward`

Afterwards `digests` returns the digests of the sent tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Forward = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class WeightOffer:
    """The arguments for the generators' end.

    `init` is for vLLM's `init_weight_transfer_engine`, once. `update` is for `update_weights`, with each update; it is
    None if the sender makes it while it sends. `nbytes`: of the weights, as sent to one engine.
    """

    init: dict[str, Any]
    update: dict[str, Any] | None
    nbytes: int


class WeightSender(Protocol):
    def offer(self, generator_ranks: int) -> WeightOffer:
        """Make the offer. The driver uses rank 0's. `generator_ranks`: number of workers of all generators."""

    def connect(self, forward: Forward | None) -> None:
        """Connect to the generators, which get `WeightOffer.init` at the same time."""

    def send(self) -> None:
        """Send the current weights. Generators load them afterwards on CPUs, at the same time on GPUs."""

    def digests(self) -> dict[str, int]:
        """Digests of this rank's part of each tensor, as sent in BF16; see `digests.added_up`."""
