"""The learners' end of the weight transfer. The generators' end is `receivers.py`; the driver starts both.

A sender lives on every learner rank. All ranks are called at the same time, in this order:

                   offer                            connect              send, once an update
    CPUs           a layout, the path of a memory   -                    each rank writes its shard into the memory
    GPUs (NCCL)    a port; names and shapes         forms the group      vLLM broadcasts from rank 0
    one shared     -                                -                    vLLM sends handles of its buffers, chunk by
    GPU (IPC)                                                            chunk, to `forward`

`digests` says afterwards what was sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Forward = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class WeightOffer:
    """What generators have to be told of the learners' weights.

    `init` goes to vLLM's `init_weight_transfer_engine`, once, and `update` to its `update_weights`, with each update.
    `update` is None where it is made while weights are sent.
    """

    init: dict[str, Any]
    update: dict[str, Any] | None


class WeightSender(Protocol):
    def offer(self, generator_ranks: int) -> WeightOffer:
        """Rank 0's counts. `generator_ranks`: workers of all generators together."""

    def connect(self, forward: Forward | None) -> None:
        """Meet the generators, which are given `WeightOffer.init` meanwhile."""

    def send(self) -> None:
        """Send the current weights. On CPUs generators load them afterwards, else meanwhile."""

    def digests(self) -> dict[str, int]:
        """Of this rank's part of each tensor, as it was sent in BF16; see `digests.added_up`."""
