"""A thread for each tracker: none of them holds up a step, and none ends a run."""

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Full, Queue
from typing import Any

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.common.text import printable
from rft_cluster.run.metrics import StepStats
from rft_cluster.run.tracker import Tracker

MOST_WAITING = 1000  # records; more means that a tracker hangs, e.g. for want of a network
CLOSE_SECONDS = 10.0  # that the end of a run waits for a tracker


class Background(Tracker):
    """A `Tracker` that passes everything on to another one, in a thread. Its methods return at once and raise nothing.

    A tracker that fails, or falls `MOST_WAITING` records behind, is given up with one line. The run goes on.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        """`name`: for messages."""
        self._name, self._tracker = name, tracker
        self._waiting: Queue[Callable[[], None] | None] = Queue(MOST_WAITING)
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def begin(self, first_step: int) -> None:
        self._put(lambda: self._tracker.begin(first_step))

    def step(self, stats: StepStats) -> None:
        self._put(lambda: self._tracker.step(stats))

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._put(lambda: self._tracker.rollouts(step, rows))

    def evaluation(self, evaluation: Evaluation, judged: Sequence[Judged]) -> None:
        self._put(lambda: self._tracker.evaluation(evaluation, judged))

    def close(self) -> None:
        """Wait until the tracker has everything, `CLOSE_SECONDS` at most."""
        if self._given_up:
            return
        self._put(self._tracker.close)
        self._put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"it has not taken everything within {CLOSE_SECONDS:g} s")

    def _put(self, work: Callable[[], None] | None) -> None:
        if self._given_up:
            return
        try:
            self._waiting.put_nowait(work)
        except Full:
            self._give_up(f"it is {MOST_WAITING} records behind")

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - whatever a tracker fails on, the run goes on
                self._give_up(f"{type(error).__name__}: {printable(str(error))}")
                return

    def _give_up(self, reason: str) -> None:
        if self._given_up:
            return
        self._given_up = True
        print(f"note: the run goes on without {self._name}: {reason[:300]}", flush=True)
