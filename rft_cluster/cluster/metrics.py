"""The series of a run, of its roles and of their engines in Ray's metrics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.exporter import Exporter
from rft_cluster.common.series import Series, Values
from rft_cluster.generator.engine_stats import ENGINE
from rft_cluster.run.series import OF_A_RUN, RunFigures

WAITING = Series("rft_prompts_waiting", "gauge", "prompts", "Queue length: prompts that wait for a generator.")
UPDATES = Series("rft_weight_updates", "counter", "updates", "Broadcasts of weights to all generators.")
UPDATE_SECONDS = Series("rft_weight_update_seconds", "counter", "s", "Time of these broadcasts, without verification.")
UPDATE_BYTES = Series(
    "rft_weight_update_bytes", "counter", "B", "Bytes that generators received: a copy each, in BF16."
)
RESTARTS = Series("rft_restarts", "counter", "restarts", "Losses after which an actor started afresh.", "actor")
SERIES = (*OF_A_RUN, WAITING, UPDATES, UPDATE_SECONDS, UPDATE_BYTES, RESTARTS, *ENGINE)
"""All series that are exported; docs/metrics.md and deploy/grafana/ are made from them."""


class RunMetrics(RunFigures):
    """The series of a run: a tracker that also reads the roles' figures.

    metrics = RunMetrics("digits", restarts.lost)
    with start_cluster(...) as cluster, metrics.exported(cluster): ...
    """

    def __init__(self, run: str, lost: Mapping[str, int]) -> None:
        """`lost`: how often each actor was lost."""
        super().__init__()
        self._lost = lost
        self._cluster: Cluster | None = None
        self._exporter = Exporter(self._values_now, {"run": run})

    @contextmanager
    def exported(self, cluster: Cluster) -> Iterator[None]:
        """Export them while this cluster lives."""
        self._cluster = cluster
        self._exporter.start()
        try:
            yield
        finally:
            self._exporter.stop()

    def _values_now(self) -> Values:
        assert self._cluster is not None
        self.pass_time()
        return {**self.read(), **of_roles(self._cluster, self._lost)}


def of_roles(cluster: Cluster, lost: Mapping[str, int]) -> Values:
    """The roles' figures, from what the driver knows of them."""
    weights = cluster.weights
    return {
        (WAITING, ""): cluster.generators.waiting,
        (UPDATES, ""): weights.updates,
        (UPDATE_SECONDS, ""): weights.seconds,
        (UPDATE_BYTES, ""): weights.bytes,
        **{(RESTARTS, name): count for name, count in dict(lost).items()},
    }
