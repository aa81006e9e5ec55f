"""What is given to Ray, with Ray's metrics recorded."""

from types import SimpleNamespace
from typing import Any

import pytest

from rft_cluster.cluster import exporter
from rft_cluster.cluster.exporter import Exporter
from rft_cluster.cluster.metrics import SERIES, RunMetrics
from rft_cluster.common.series import Figures, Series
from tests.unit.run.steps import stats

LEVEL = Series("rft_level", "gauge", "1", "A level.")
COUNT = Series("rft_count", "counter", "1", "A count.", "who")
CALLS: list[tuple[Any, ...]] = []


class Counter:
    def __init__(self, name: str, description: str, keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, set(keys)

    def inc(self, value: float, labels: dict[str, str]) -> None:
        assert value > 0 and labels.keys() == self.keys, "or Ray raises"
        CALLS.append((self.name, value, labels))


class Gauge(Counter):
    def set(self, value: float, labels: dict[str, str]) -> None:
        assert labels.keys() == self.keys
        CALLS.append((self.name, value, labels))


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(exporter, "Counter", Counter)
    monkeypatch.setattr(exporter, "Gauge", Gauge)
    monkeypatch.setattr(exporter, "PERIOD", 0.01)


def test_a_counter_gets_what_was_added_and_a_gauge_the_value():
    figures = Figures()
    giving = Exporter(figures.read, {"run": "digits"})
    figures.add(COUNT, 0, "a")
    for _ in range(2):
        figures.set(LEVEL, 0.5)
        giving.export()
    figures.add(COUNT, 2, "a")
    figures.add(COUNT, 3, "a")
    giving.export()
    giving.export()
    assert [call for call in CALLS if call[0] == "rft_count"] == [("rft_count", 5, {"run": "digits", "who": "a"})]
    assert [call for call in CALLS if call[0] == "rft_level"] == [("rft_level", 0.5, {"run": "digits"})] * 4


CLUSTER: Any = SimpleNamespace(
    generators=SimpleNamespace(waiting=3), weights=SimpleNamespace(updates=1, seconds=0.5, bytes=8)
)


def test_a_run_is_exported_with_its_roles_and_its_losses_and_at_the_end_once_more():
    metrics = RunMetrics("digits", {"generator-0": 2})
    with metrics.exported(CLUSTER):
        metrics.phase("learn")
        metrics.step(stats())
    found = {(name, *labels.values()): value for name, value, labels in CALLS}
    assert found["rft_reward", "digits"] == 0.75
    assert found["rft_prompts_waiting", "digits"] == 3
    assert found["rft_weight_update_bytes", "digits"] == 8
    assert found["rft_restarts", "digits", "generator-0"] == 2
    assert found["rft_phase", "digits", "learn"] == 1


def test_an_export_that_fails_is_said_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]):
    metrics = RunMetrics("digits", {})
    broken: Any = SimpleNamespace(weights=CLUSTER.weights)
    with metrics.exported(broken):
        metrics._exporter._thread.join(5)
    with metrics.exported(CLUSTER):
        metrics.step(stats())
    said = capsys.readouterr().out
    assert said.count("WARNING: no more metrics for Prometheus: AttributeError") == 1
    assert ("rft_reward", 0.75, {"run": "digits"}) in CALLS, "the next cluster's figures are exported"


def test_names_are_those_that_prometheus_gets():
    assert (LEVEL.exported, COUNT.exported) == ("ray_rft_level", "ray_rft_count_total")
    assert len({one.exported for one in SERIES}) == len(SERIES)
