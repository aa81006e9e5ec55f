"""The generators' end of a weight update as learner 0 calls it, through Ray."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from rft_cluster.cluster.handles import ActorGroup
from rft_cluster.messages import WeightRecord
from rft_cluster.weights.nccl import nccl_init_infos


class GeneratorsClient:
    """The generators as the sending learner sees them (see `weights.client.WeightClient`)."""

    def __init__(
        self, generators: ActorGroup, addresses: Sequence[str], tensor_parallel: int, sender_address: str
    ) -> None:
        """`addresses`: of the generators' hosts, in their order; `sender_address`: of learner 0's host."""
        self._generators = generators
        self._tensor_parallel = tensor_parallel
        self._elsewhere = [address != sender_address for address in addresses]
        self.ranks = len(generators) * tensor_parallel

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [init_info] * len(self._generators)
        if "rank_offset" in init_info:
            infos = nccl_init_infos(init_info, [self._tensor_parallel] * len(self._generators))
        self._generators.call_each("init_weight_transfer_engine", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        self._generators.call_all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._generators.call_all("update_weights", update_info)

    def finish_weight_update(self, version: int) -> None:
        self._generators.call_all("finish_weight_update", version)

    def load_weights(self, update_info: dict[str, Any], version: int) -> None:
        """Shared memory ends at the host: to others its contents go through Ray's object store, once to each host."""
        data = None
        if any(self._elsewhere):
            data = ray.put(np.fromfile(update_info["path"], dtype=np.uint8, count=update_info["nbytes"]))
        arguments = (update_info, version)
        self._generators.call_each(
            "load_weights", [(*arguments, data) if elsewhere else arguments for elsewhere in self._elsewhere]
        )

    def prove_weights(self, version: int, digests: dict[str, int]) -> list[WeightRecord]:
        return self._generators.call_all("prove_weights", version, digests)
