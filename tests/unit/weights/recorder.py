"""Generators that keep what a sender tells them, for tests of both ends of a transfer."""

import threading
from typing import Any

from rft_cluster.messages import WeightRecord
from rft_cluster.weights.digests import combined_digest


class Generators:
    """Keeps what it is told; proves at once, or when `prove` is set, and answers with `records`."""

    def __init__(self) -> None:
        self.ranks = 2
        self.heard: list[Any] = []
        self.records: list[WeightRecord] | None = None
        self.prove = threading.Event()
        self.prove.set()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.heard.append(init_info)

    def start_weight_update(self) -> None:
        self.heard.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.heard.append(update_info)

    def finish_weight_update(self, version: int) -> None:
        self.heard.append(version)

    def load_weights(self, update_info: dict[str, Any], version: int) -> None:
        self.heard += [update_info, version]

    def prove_weights(self, version: int, digests: dict[str, int]) -> list[WeightRecord]:
        assert self.prove.wait(10)
        self.heard.append(digests)
        return self.records or [WeightRecord(version, combined_digest(digests), 222)] * 2
