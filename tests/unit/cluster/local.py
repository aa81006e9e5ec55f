"""Actors in this process: their calls run in threads, as Ray's run in processes, and are waited for alike."""

from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from rft_cluster.cluster import handles, weight_sync
from rft_cluster.common.errors import ClusterError


class LocalActor:
    """A handle on `role`; like Ray's, a call takes results of other calls as arguments."""

    def __init__(self, role: Any, threads: ThreadPoolExecutor) -> None:
        self._role, self._threads = role, threads

    def __getattr__(self, method: str) -> Any:
        def run(arguments: tuple[Any, ...]) -> Any:
            values = [argument.result() if isinstance(argument, Future) else argument for argument in arguments]
            return getattr(self._role, method)(*values)

        remote = SimpleNamespace(remote=lambda *arguments: self._threads.submit(run, arguments))
        remote.options = lambda **_: remote
        return remote


@contextmanager
def local_actors(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """Threads for `LocalActor`s. They are left behind, as actors are, when a test ends while they hang."""

    def wait_for(calls: Mapping[Future[Any], str], timeout: float, doing: str, meanwhile: Any = None) -> list[Any]:
        done, _ = wait(calls, timeout, FIRST_EXCEPTION)  # as `ray.get`: the first that fails is raised
        for call in done:
            try:
                call.result()
            except handles.LOSSES as error:
                raise ClusterError(f"{calls[call]} died", [calls[call]]) from error
        return [call.result(0) for call in calls]

    for module in (handles, weight_sync):
        monkeypatch.setattr(module, "wait_for", wait_for)
        monkeypatch.setattr(module, "failure", lambda call: call.exception() if call.done() else None)
    pool = ThreadPoolExecutor(32)
    yield pool
    pool.shutdown(wait=False, cancel_futures=True)
