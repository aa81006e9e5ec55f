"""Run a user's own reward function in a separate process.

    brevity = IsolatedFunction("my_package.my_module:brevity", time_limit=10.0, max_concurrent=32)
    values = await brevity(prompt, completions)     # for each a float, or the reason why there is none

The function may raise, return something else than a number, hang (also in native code), or crash the interpreter. Each
failure costs only the completion on which it happened. A late call of an `async` function is cancelled by its own event
loop. A process that dies, or is silent for too long, is killed with its subprocesses, and replaced.

`pending.py` decides which completions are sent at once and which one failed; `child.py` is the code of the process.

A library's process pool does not fit: a task has one answer and one time limit, so an image would be sent for each
completion. pebble's pool, otherwise suitable, breaks for good if a worker dies between two tasks.
"""

import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Sequence

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.messages import Completion, Prompt
from rft_cluster.rewards.child import GRACE, Answer, Child, Kind
from rft_cluster.rewards.pending import Call, Pending

LOADING_LINE = 10.0  # seconds between lines about the import
MOST_PRINTED = 100_000  # bytes read of a function's output
LAST_LINES = 5  # lines shown of the output of a process that ended during the import


class IsolatedFunction:
    """Calls the function of a dotted path in a child process, which starts at once and imports it there.

    The child has this process's sys.path, working directory and environment, so it finds the same modules. All methods
    except `close` and `printed` need a running event loop, which may be a different one each time.

    Args:
        time_limit: seconds for one call.
        max_concurrent: completions that may be in flight at once.
        quiet: keep the function's output for `printed`, instead of writing it to this process's output.
        load_limit: seconds for the import.
    """

    def __init__(
        self, name: str, time_limit: float, max_concurrent: int, quiet: bool = False, load_limit: float = 300.0
    ) -> None:
        self._name, self._time_limit, self._load_limit = name, time_limit, load_limit
        # Without a name, so that nothing is left of it. The child opens it under /proc.
        self._output = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - `close` closes it
        self._child: Child | None = self._new_child()
        self._started = time.monotonic()  # start of the child
        self._heard = self._started  # time of the child's last message, or of the first request after an idle time
        self._problem = ""  # the reason why the function cannot be imported
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loading: list[asyncio.Future[None]] = []  # callers of `wait_until_ready`
        self._pending = Pending(max_concurrent)
        self._keys = itertools.count()  # of prompts

    async def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float | str]:
        """Score completions. Returns for each, in order, the function's value or the reason why there is none.

        Raises:
            UserError: the child cannot import the function.
        """
        loop, key = self._attach(), next(self._keys)
        calls = [Call(key, prompt, completion, loop.create_future()) for completion in completions]
        self._pending.add(calls)
        loop.call_soon(self._ask)  # a little later, so that groups which are scored together share a batch
        try:
            return list(await asyncio.gather(*(call.value for call in calls)))
        finally:
            if self._child:
                self._child.forget(key)

    async def wait_until_ready(self) -> None:
        """Wait until the child has imported the function. Prints lines about a long import.

        Raises:
            UserError: the function cannot be imported.
        """
        loop = self._attach()
        loading = loop.create_future()
        self._loading.append(loading)
        self._ask()
        while not (await asyncio.wait([loading], timeout=LOADING_LINE))[0]:
            passed = f"{time.monotonic() - self._started:.0f} s of at most {self._load_limit:g} s"
            print(f"waiting for the import of rewards.{self._name}: {passed}", flush=True)
        if self._problem:
            raise UserError(self._problem)

    def printed(self) -> list[str]:
        """The first lines of the function's output, escaped. Empty unless `quiet`."""
        if self._output is None:
            return []
        said = os.pread(self._output.fileno(), MOST_PRINTED, 0)
        return [shown(line) for line in said.decode(errors="replace").splitlines()]

    def close(self) -> None:
        """End the child and its subprocesses."""
        if self._child:
            self._child.kill()
        if self._output:
            self._output.close()

    def _new_child(self) -> Child:
        output = f"/proc/{os.getpid()}/fd/{self._output.fileno()}" if self._output else ""
        return Child(self._name, self._time_limit, output)

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Read the child's messages in the running event loop from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._timer = loop, None
            self._heard = time.monotonic()  # no loop has listened since the last one
            if self._child:
                loop.add_reader(self._child.pipe.fileno(), self._hear)
        return loop

    def _ask(self) -> None:
        """Send requests up to the limit. Start a child if there is none. Wake callers that wait for the import."""
        if self._problem:
            self._pending.give_up(UserError(self._problem))
            self._loaded()
        elif self._child is None and (self._pending.left or self._loading):
            assert self._loop
            self._child = self._new_child()
            self._started = time.monotonic()
            self._loop.add_reader(self._child.pipe.fileno(), self._hear)
        elif self._child and self._child.kind:
            self._loaded()
            if not self._pending.asked:
                self._heard = time.monotonic()
            while request := self._pending.next(self._child.kind):
                prompts = [(call.key, call.prompt) for call in request.calls]
                self._child.ask(request.number, prompts, [call.completion for call in request.calls])
        self._set_timer()

    def _hear(self) -> None:
        """Read all messages of the child, or the end of its pipe."""
        self._heard = time.monotonic()
        try:
            while self._child and self._child.pipe.poll():
                self._take(self._child.pipe.recv())
        except (EOFError, OSError):
            assert self._child
            ending = self._child.ending()
            if self._child.kind is None:
                self._problem = f"rewards: {self._name!r}: its import ends the process ({ending}){self._last_lines()}"
            self._end_child(f"its process died ({ending})")
        self._ask()

    def _take(self, message: Kind | str | tuple[int, Answer | None]) -> None:
        assert self._child
        if isinstance(message, Kind):
            self._child.kind = message
        elif isinstance(message, str):
            self._problem = message
            self._end_child("")
        else:
            number, answer = message
            if answer is None:
                self._pending.begun(number)
            else:
                self._pending.answered(number, answer)

    def _set_timer(self) -> None:
        """Set a timer for the next message."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._child and (self._pending.asked or self._child.kind is None):
            assert self._loop
            self._timer = self._loop.call_later(max(0.0, self._silence() - time.monotonic()), self._silent)

    def _silence(self) -> float:
        """The monotonic time by which the next message is due."""
        assert self._child
        kind = self._child.kind
        if kind is None:
            return self._started + self._load_limit
        # An event loop cancels and answers a late call itself, so only a blocked loop is silent.
        return self._heard + self._time_limit + (GRACE if kind.concurrent else 0.0)

    def _silent(self) -> None:
        assert self._child
        if self._child.kind is None:
            self._problem = (
                f"rewards: {self._name!r}: its module was not imported within {self._load_limit:g} s "
                f"(scoring.load_limit){self._last_lines()}"
            )
        limit = f"{self._time_limit:g} s"
        concurrent = self._child.kind and self._child.kind.concurrent
        self._end_child(f"its event loop was blocked for over {limit}" if concurrent else f"no answer within {limit}")
        self._ask()

    def _end_child(self, reason: str) -> None:
        """Kill the child. Its requests fail with this reason, or are retried in the next child."""
        assert self._child and self._loop
        self._loop.remove_reader(self._child.pipe.fileno())
        self._child.kill()
        self._child = None
        self._pending.died(reason)

    def _loaded(self) -> None:
        for future in self._loading:
            if not future.done():
                future.set_result(None)
        self._loading.clear()

    def _last_lines(self) -> str:
        lines = self.printed()[-LAST_LINES:]
        return "\n".join([". It printed last:", *(f"  {line}" for line in lines)]) if lines else ""
