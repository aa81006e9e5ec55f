"""The generators as the sending learner sees them, and what they must answer."""

from typing import Any, Protocol

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.messages import WeightRecord
from rft_cluster.weights.digests import combined_digest


class WeightClient(Protocol):
    """The generators as the sender sees them: each call reaches all of them and returns when all have answered."""

    ranks: int  # of all generators together: the sum of their tensor-parallel sizes

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, version: int) -> None: ...

    def load_weights(self, update_info: dict[str, Any], version: int) -> None: ...

    def prove_weights(self, version: int, digests: dict[str, int]) -> list[WeightRecord]: ...


class WeightSender(Protocol):
    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


def check_records(records: list[WeightRecord], version: int, digest: int) -> None:
    """Is what the generators say they serve what was sent?

    Args:
        digest: combined digest of the tensors as they were sent.

    Raises:
        WeightTransferError: a generator reports another version, received other bytes, or holds other parameters
            than its peers; or none reports at all.
    """
    if not records:
        raise WeightTransferError(f"no generator reports that it serves version {version}")
    for index, record in enumerate(records):
        if record.version != version:
            raise WeightTransferError(f"generator {index} serves version {record.version} instead of {version}")
        if record.received != digest:
            raise WeightTransferError(f"generator {index} received other weights for version {version} than were sent")
        if record.loaded != records[0].loaded:
            raise WeightTransferError(f"generators 0 and {index} hold different parameters for version {version}")


class VersioningClient:
    """A client that gives each update its `version`: vLLM's senders know none."""

    def __init__(self, client: WeightClient) -> None:
        self._client = client
        self.ranks = client.ranks
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._client.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._client.finish_weight_update(int(weight_version) if weight_version else self.version)

    def load_weights(self, update_info: dict[str, Any]) -> None:
        self._client.load_weights(update_info, self.version)

    def prove(self, digests: dict[str, int]) -> None:
        """Hold what all generators received against what was sent.

        Raises:
            WeightTransferError: they differ.
        """
        records = self._client.prove_weights(self.version, digests)
        check_records(records, self.version, combined_digest(digests))
