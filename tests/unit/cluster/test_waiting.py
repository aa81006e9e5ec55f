"""What the driver does every second while it waits for actors."""

import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError

from rft_cluster.cluster import handles, rollouts
from rft_cluster.cluster.handles import wait_for
from rft_cluster.cluster.rollouts import Generators
from rft_cluster.common.errors import ClusterError
from rft_cluster.messages import Sampling
from tests.unit.some_prompt import some_prompt


class Clock:
    """Time passes while Ray waits, and while `meanwhile` works."""

    def __init__(self, ready_at: float) -> None:
        self.now, self.looks, self._ready_at = 0.0, list[float](), ready_at

    def get(self, calls: list[str], timeout: float) -> list[str]:
        if self._ready_at > self.now + timeout:
            self.now += timeout
            raise GetTimeoutError
        self.now = max(self.now, self._ready_at)
        return calls

    def meanwhile(self) -> None:
        self.looks.append(self.now)
        self.now += 0.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Clock:
    clock = Clock(request.param)
    ray = SimpleNamespace(get=clock.get, wait=lambda calls, **_: ([], calls))
    monkeypatch.setattr(handles, "ray", ray)
    monkeypatch.setattr(handles, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("clock", [0.2, 3.2], indirect=True)
def test_it_looks_at_other_things_every_second_and_has_the_answer_when_it_is_there(clock: Clock):
    ready = clock._ready_at
    assert wait_for({"call": "learner-0"}, 10.0, "update", clock.meanwhile) == ["call"]  # type: ignore[dict-item]
    assert clock.now == ready
    assert clock.looks == ([] if ready == 0.2 else [1.0, 2.5])


@pytest.mark.parametrize("clock", [99.0], indirect=True)
@pytest.mark.parametrize("looks", [True, False])
def test_the_deadline_is_kept(clock: Clock, looks: bool):
    more = [clock.meanwhile] if looks else []
    with pytest.raises(ClusterError, match="learner-0: no answer to 'update' within 10 s"):
        wait_for({"call": "learner-0"}, 10.0, "update", *more)  # type: ignore[dict-item]
    assert clock.now == 10.0


def test_it_looks_at_other_things_while_prompts_wait_for_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollouts, "LOOK", 0.02)
    generators, looked = Generators({}, 0.2, 8), threading.Event()
    generators.meanwhile = looked.set
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"no room for 3 prompts came within 0.2 s"):
        generators.generate([some_prompt(f"train/0/{index}") for index in range(3)], Sampling(1, 1.0, 8), 0)
    assert looked.is_set()
    assert 0.2 <= time.monotonic() - began < 10
