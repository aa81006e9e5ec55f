"""What nodes are asked for before actors start; a recorder stands in for Ray's tasks, as there is no GPU and no hub."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rft_cluster.cluster import nodes as module
from rft_cluster.cluster import start
from rft_cluster.cluster.gpus import HIDE_GPUS, Driver, Gpu
from rft_cluster.cluster.nodes import check_gpus, check_shared, fetch_model
from rft_cluster.cluster.placement import NodeResources
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config

ONE, TWO = "a" * 56, "b" * 56  # ids of nodes
NODES = {ONE: "10.0.0.1", TWO: "10.0.0.2"}
GOOD = Driver("580.65.06", 13000, [Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80)])
OLD = Driver("550.54.14", 12040, [])


class Tasks:
    """`asked`: the options of each task. `answers`: what the nodes return, or the function's own result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[Any] | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.waits: list[tuple[float, str]] = []
        self._answers = answers
        monkeypatch.setattr(module.ray, "remote", self._remote)
        monkeypatch.setattr(module, "wait_for", self._wait_for)

    def _remote(self, work: Any, **chosen: Any) -> SimpleNamespace:
        def remote(*arguments: Any) -> tuple[int, Any]:
            self.asked.append(chosen)
            return len(self.asked), None if self._answers else work(*arguments)

        return SimpleNamespace(options=lambda **more: self._remote(work, **chosen | more), remote=remote)

    def _wait_for(self, calls: dict[tuple[int, Any], str], timeout: float, doing: str) -> list[Any]:
        self.waits.append((timeout, doing))
        return self._answers or [result for _, result in calls]


def test_each_node_is_asked_where_its_gpus_can_be_seen(monkeypatch):
    """By a task that takes no GPU: were they hidden from it, all would seem well."""
    tasks = Tasks(monkeypatch, [GOOD, GOOD])
    check_gpus(NODES)
    assert [(one["scheduling_strategy"].node_id, one["scheduling_strategy"].soft) for one in tasks.asked] == [
        (ONE, False),
        (TWO, False),
    ]
    assert all(one["num_cpus"] == 0 and one["runtime_env"] == {"env_vars": {HIDE_GPUS: "0"}} for one in tasks.asked)


def test_nodes_that_are_to_leave_have_the_seconds_until_their_time(monkeypatch):
    """Ray gives milliseconds since 1970, and 0 without a time."""
    nodes = [NodeResources(name, address, 1, 0) for name, address in [*NODES.items(), ("c" * 56, "10.0.0.3")]]
    monkeypatch.setattr(module, "cluster_nodes", lambda: nodes)
    monkeypatch.setattr(module.time, "time", lambda: 1_790_000_000.0)
    gone = "d" * 56
    draining = {ONE: 1_790_000_028_500, TWO: 0, gone: 0}
    monkeypatch.setattr(module.state, "get_draining_nodes", lambda: draining)
    assert module.told_to_leave() == {"10.0.0.1": 28.5, "10.0.0.2": math.inf}


def test_the_host_whose_driver_is_too_old_is_named(monkeypatch):
    Tasks(monkeypatch, [GOOD, OLD])
    with pytest.raises(UserError, match=r"^10\.0\.0\.2 has the NVIDIA driver 550\.54\.14"):
        check_gpus(NODES)


def test_a_model_of_the_hub_is_fetched_on_each_node_and_a_folder_is_not(monkeypatch, tmp_path, capsys):
    fetched: list[str] = []
    monkeypatch.setattr(module, "whole_model", fetched.append)
    tasks = Tasks(monkeypatch)
    fetch_model(NODES, str(tmp_path), 77)
    assert not tasks.asked and not capsys.readouterr().out
    fetch_model(NODES, "owner/model", 77)
    assert fetched == ["owner/model"] * 2
    assert tasks.waits == [(77, "fetch")]
    assert "fetching owner/model on 2 nodes" in capsys.readouterr().out


def test_a_node_that_cannot_fetch_the_model_is_named(monkeypatch):
    def unreachable(path: str) -> Path:
        raise UserError("model.path: the hub cannot be reached")

    Tasks(monkeypatch)
    monkeypatch.setattr(module, "whole_model", unreachable)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "gpu-7")
    with pytest.raises(UserError, match=r"^on gpu-7: model\.path: the hub cannot be reached"):
        fetch_model(NODES, "owner/model", 77)


def test_a_node_that_does_not_see_the_run_s_folder_is_named(monkeypatch, tmp_path):
    """Under its whole path: on another node Ray's processes have another working folder."""
    monkeypatch.setattr(module, "SEEN_WITHIN", 0.0)
    monkeypatch.chdir(tmp_path)
    shared, own = Path("shared"), Path("own", "probe")
    shared.write_text("")
    Tasks(monkeypatch)
    check_shared(NODES, [("model.path", shared)])
    Tasks(monkeypatch, [(), (str(tmp_path / own),)])  # what the second node would answer
    with pytest.raises(UserError, match=rf"^run\.folder: 10\.0\.0\.2 has no {tmp_path / 'own'} of this machine: give"):
        check_shared(NODES, [("model.path", shared), ("run.folder", own)])
    assert module._unseen([str(shared), str(own)]) == (str(own),)


@pytest.mark.parametrize(("model", "key"), [("runs/.tiny/abc", "run.folder"), ("elsewhere", "model.path")])
def test_nodes_must_see_the_model_and_the_run_s_folder(monkeypatch, tmp_path, model, key):
    """The small model lies beside the runs: its place is changed by the runs' folder."""
    config = load_config("digits", [f"run.folder={tmp_path / 'runs'}", "run.name=mine"])
    checked: list[tuple[str, Path]] = []
    monkeypatch.setattr(start, "check_shared", lambda _, files: checked.extend(files))
    monkeypatch.setattr(start, "fetch_model", lambda *_: None)
    (tmp_path / model).mkdir(parents=True)
    config.run_folder.mkdir(parents=True)
    start._prepare(NODES, config, str(tmp_path / model), training=True)
    (first, file), (second, probe) = checked
    assert (first, file, second) == (key, tmp_path / model / "config.json", "run.folder")
    assert probe.parent == config.run_folder


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens until actors may start, on a clock that each event moves on by 1000 s."""
    events: list[str] = []
    reservation = SimpleNamespace(groups=[], give_back=lambda: None)

    def event(name: str, result: Any = None) -> Any:
        return lambda *_: events.append(name) or result

    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 * len(events))
    monkeypatch.setattr(start, "connect", lambda *_: "connected")
    monkeypatch.setattr(start, "cluster_nodes", lambda: [NodeResources(ONE, "10.0.0.1", 8, 8)])
    monkeypatch.setattr(start, "reserve", event("reserve", reservation))
    monkeypatch.setattr(start, "addresses_of", lambda groups: {ONE: "10.0.0.1"})
    monkeypatch.setattr(start, "check_gpus", event("check GPUs"))
    monkeypatch.setattr(start, "check_shared", event("check folders"))
    monkeypatch.setattr(start, "fetch_model", event("fetch"))
    monkeypatch.setattr(start.ray, "shutdown", lambda: None)
    return events


GPUS = ["cluster.device=cuda", "learners.gpus=1", "generators.gpus=1"]


@pytest.mark.parametrize(
    ("overrides", "events"),
    [
        ([*GPUS, "cluster.address=10.0.0.1:6379"], ["reserve", "check GPUs", "check folders", "fetch"]),
        (["cluster.address=10.0.0.1:6379"], ["reserve", "check folders", "fetch"]),
        (GPUS, ["reserve"]),
    ],
)
def test_the_time_for_the_actors_start_runs_when_nodes_have_what_they_need(
    reserved, monkeypatch, tmp_path, overrides, events
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config("digits", [*overrides, "cluster.start_timeout=600", f"run.folder={tmp_path}"])
    config.run_folder.mkdir()
    with start._reserved(config, True, "owner/model", {}) as actors:
        assert reserved == events
        assert actors.left() == 600


def test_a_driver_that_cannot_ask_for_notices_gets_none():
    assert module.told_to_leave() == {}  # Ray is not connected here, as it is not in a driver that is its client
