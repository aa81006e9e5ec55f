"""The early check that a shared cluster has room for a run."""

import pytest

from rft_cluster.cluster import start
from rft_cluster.cluster.placement import NodeResources
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config

NEEDED = 2.0  # CPUs of digits


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """A node of two CPUs, of which some are free at each asking. Its clock goes on by what is slept."""

    def with_free(*free: float) -> None:
        now, answers = [0.0], list(free)
        monkeypatch.setattr(start, "connect", lambda config, cpus: "Ray cluster at head:6379")
        monkeypatch.setattr(start, "cluster_nodes", lambda: [NodeResources("n0", "head", NEEDED, 0)])
        monkeypatch.setattr(start.ray, "available_resources", lambda: {"CPU": answers.pop(0) if answers else free[-1]})
        monkeypatch.setattr(start.ray, "shutdown", lambda: None)
        monkeypatch.setattr(start.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(start.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    return with_free


@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("free", [0, 1.9, 1.999, 2, 2.5])
def test_what_is_taken_is_said_and_after_some_patience_refused(cluster, free: float, patience: float):
    cluster(free)
    config = load_config("digits", [])
    if free >= NEEDED:
        assert "taken" not in start.check_cluster(config, patience)
    elif patience:
        with pytest.raises(UserError, match=f"{free:g} CPUs and 0 GPUs are free, 2 and 0 are needed"):
            start.check_cluster(config, patience)
    else:
        assert f"{free:g} CPUs and 0 GPUs are free" in start.check_cluster(config, patience)


@pytest.mark.parametrize("freed_after", range(1, 6))
def test_what_becomes_free_in_time_is_waited_for(cluster, freed_after: int):
    cluster(*[0.0] * freed_after, NEEDED)
    config = load_config("digits", [])
    if freed_after <= 3:
        assert "taken" not in start.check_cluster(config, patience=3)
    else:
        with pytest.raises(UserError):
            start.check_cluster(config, patience=3)
