"""Give figures to Ray's metrics, where Prometheus reads them.

Whoever has figures changes plain numbers; a thread gives them to Ray once a second. So nobody waits for an export, and
one that fails ends no run. Ray sends them to its agents every 10 s.
"""

import threading
from collections.abc import Callable, Mapping

from ray.util.metrics import Counter, Gauge

from rft_cluster.common.series import Series, Values

PERIOD = 1.0  # seconds


class Exporter:
    """Exports the values that `read` returns, with these labels beside the series' own."""

    def __init__(self, read: Callable[[], Values], labels: Mapping[str, str]) -> None:
        self._read, self._labels = read, dict(labels)
        self._metrics: dict[Series, Counter | Gauge] = {}
        self._told: dict[tuple[Series, str], float] = {}
        self._stop = threading.Event()

    def start(self) -> None:
        """Export every second, in a thread, until `stop` or the end of the process."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._go_on, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Export once more, and end the thread."""
        self._stop.set()
        self._thread.join()

    def export(self) -> None:
        for (series, label), value in self._read().items():
            labels = self._labels | ({series.label: label} if series.label else {})
            metric = self._metrics.get(series) or self._metrics.setdefault(series, self._metric(series))
            if isinstance(metric, Gauge):
                metric.set(value, labels)
            # Ray's counters take what is to be added, which must be more than 0.
            elif (grown := value - self._told.get((series, label), 0.0)) > 0:
                metric.inc(grown, labels)
                self._told[series, label] = value

    def _metric(self, series: Series) -> Counter | Gauge:
        keys = (*self._labels, *filter(None, [series.label]))
        kind = Counter if series.kind == "counter" else Gauge
        return kind(series.name, f"{series.meaning} [{series.unit}]", keys)

    def _go_on(self) -> None:
        try:
            while not self._stop.wait(PERIOD):
                self.export()
            self.export()
        except Exception as error:  # noqa: BLE001 - said; figures are no reason to end a run
            print(f"WARNING: no more metrics for Prometheus: {type(error).__name__}: {error}", flush=True)
