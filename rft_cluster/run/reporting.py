"""A run writes its own report, `report.html`, at each evaluation and at its end: in a process beside it.

That process takes only the time that nobody else wants of the processors, and whatever becomes of it, the run goes on.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.common.text import shown
from rft_cluster.run.tracker import Tracker

FILE = "report.html"
COMMAND = (sys.executable, "-m", "rft_cluster.report", "--quick", "--")
LAST_WITHIN = 120.0  # seconds: for the last report the run waits so long
ENDED_WITHIN = 5.0  # seconds: that one gets when a run is stopped, before it is killed


class Reports(Tracker):
    """The reports of a run: a context, at whose end no process is left.

    with Reports(run) as reports:
        ...                  # with reports among the trackers: one at each evaluation
        reports.finish()
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Reports":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._end()

    def evaluation(self, evaluation: Evaluation, judged: Sequence[Judged]) -> None:
        """Begin a report, unless one is being written. Returns at once."""
        if self._process is None or self._process.poll() is not None:
            with suppress(OSError):  # no memory for a process, no room in /tmp: the last report says so
                self._start()
                self._schedule(os.SCHED_IDLE)

    def finish(self) -> None:
        """Write the last report, and say where it is, or why it is not."""
        self._end()
        try:
            self._start()
            assert self._process is not None
            code = self._process.wait(LAST_WITHIN)
        except subprocess.TimeoutExpired:
            print(f"note: the report took more than {LAST_WITHIN:.0f} s: {self._by_hand}", flush=True)
            return
        except OSError as error:
            self._say_why_not(str(error))
            return
        if code:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            self._say_why_not((said or ["it was killed"])[-1])
        else:
            print(f"the report, for a browser: {self._run / FILE}", flush=True)

    def _say_why_not(self, reason: str) -> None:
        print(f"note: the report was not written ({shown(reason[:300])}): {self._by_hand}", flush=True)

    @property
    def _by_hand(self) -> str:
        return f"python -m rft_cluster.report {shlex.quote(str(self._run))}"

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        # A session of its own: Ctrl-C is for the run, which then ends this process itself.
        self._process = subprocess.Popen(
            [*COMMAND, str(self._run)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def _schedule(self, policy: int) -> None:
        with suppress(OSError):  # a system that knows no such policy, or a process that has ended
            assert self._process is not None
            os.sched_setscheduler(self._process.pid, policy, os.sched_param(0))

    def _end(self) -> None:
        if self._process is None:
            return
        self._schedule(os.SCHED_OTHER)  # with idle time alone it might not get to its end
        self._process.terminate()
        try:
            self._process.wait(ENDED_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
