"""A reward function of the user's own, in a process of its own.

    brevity = IsolatedFunction("my_package.my_module:brevity", time_limit=10.0, max_concurrent=32)
    values = await brevity(prompt, completions)     # for each a float, or a text that says why there is none

There it may raise, return what is no number, hang (in native code, too), or take the interpreter down: each costs the
one completion that it happened on. Completions of all calls wait in one queue, so that groups which are scored at the
same time share the limit:

| the function | calls at once | completions in a call |
|---|---|---|
| `def f(prompt, completion)` | 1 | 1 |
| `def f(prompts, completions)` | 1 | all that wait, up to the limit |
| `async def f(prompt, completion)` | up to the limit | 1 |
| `async def f(prompts, completions)` | any number | all that wait, up to what others have left of the limit |

A late call of an `async` function is cancelled by its own event loop. A process that dies, or is silent for too long,
is killed with all that it started, and a new one goes on. If it was scoring one completion, that one is to blame. If it
was scoring several, each is asked once more, alone. So is each of a batch that failed as a whole.

Not a library's process pool: there a task has one answer and one limit, so an image would cross for each completion;
pebble's, otherwise fit, is broken for good by a worker that dies between two tasks.
"""

import asyncio
import itertools
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.messages import Completion, Prompt
from rft_cluster.rewards.child import GRACE, Answer, Child, Kind

LOAD_LIMIT = 300.0  # seconds that the import of the user's module may take: it may load a reward model
LOADING_LINE = 10.0  # seconds between lines that say what is waited for
MOST_PRINTED = 100_000  # bytes of what a function prints that are looked at
LAST_LINES = 5  # of what a process printed, where it ended during the import


@dataclass(frozen=True, slots=True)
class _Call:
    """One completion, and the value that is awaited for it. `key` stands for its prompt."""

    key: int
    prompt: Prompt
    completion: Completion
    value: "asyncio.Future[float | str]"


@dataclass(slots=True)
class _Request:
    """One call of the function. `alone`: it is asked once more, with nothing beside it; `begun`: the child has said."""

    calls: list[_Call]
    alone: bool = False
    begun: bool = False


class IsolatedFunction:
    """Calls the function of a dotted path in a child process, which starts at once and imports it there.

    The child has this process's sys.path, working directory and environment, so it finds what `find_function` finds.
    All methods but `close` and `printed` need a running event loop, which may be another one each time.

    Args:
        time_limit: seconds for one call.
        max_concurrent: completions that may be under way at once.
        quiet: what the function prints is kept for `printed`; else it goes where this process's output goes.
    """

    def __init__(self, name: str, time_limit: float, max_concurrent: int, quiet: bool = False) -> None:
        self._name, self._time_limit, self._max_concurrent = name, time_limit, max_concurrent
        self._output = _new_file() if quiet else None
        self._child: Child | None = self._new_child()
        self._started = time.monotonic()  # of the child
        self._heard = self._started  # when the child said something, or was asked after it had nothing to do
        self._problem = ""  # why the function cannot be had
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loading: list[asyncio.Future[None]] = []  # who waits until it is imported
        self._waiting: deque[_Call] = deque()
        self._again: deque[_Request] = deque()
        self._asked: dict[int, _Request] = {}  # by number
        self._keys, self._numbers = itertools.count(), itertools.count()

    async def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float | str]:
        """For each completion, in order, the function's value, or why there is none.

        Raises:
            UserError: the child cannot import the function.
        """
        loop, key = self._attach(), next(self._keys)
        calls = [_Call(key, prompt, completion, loop.create_future()) for completion in completions]
        self._waiting += calls
        loop.call_soon(self._ask)  # not at once: the groups that are scored together may make one batch
        try:
            return list(await asyncio.gather(*(call.value for call in calls)))
        finally:
            if self._child:
                self._child.forget(key)

    async def wait_until_ready(self) -> None:
        """Until the child has imported the function; lines say how long that has taken.

        Raises:
            UserError: it cannot be imported.
        """
        loop = self._attach()
        loading = loop.create_future()
        self._loading.append(loading)
        self._ask()
        while not (await asyncio.wait([loading], timeout=LOADING_LINE))[0]:
            passed = f"{time.monotonic() - self._started:.0f} s of at most {LOAD_LIMIT:g} s"
            print(f"waiting for the import of rewards.{self._name}: {passed}", flush=True)
        if self._problem:
            raise UserError(self._problem)

    def printed(self) -> list[str]:
        """The first lines that the function has printed, harmless to show. Empty where this is not `quiet`."""
        if self._output is None:
            return []
        with self._output.open("rb") as file:
            return [shown(line) for line in file.read(MOST_PRINTED).decode(errors="replace").splitlines()]

    def close(self) -> None:
        """End the child and what it started."""
        if self._child:
            self._child.kill()
        if self._output:
            self._output.unlink(missing_ok=True)

    def _new_child(self) -> Child:
        return Child(self._name, self._time_limit, str(self._output or ""))

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Listen in the running event loop from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._timer = loop, None
            self._heard = time.monotonic()  # nobody has listened since the last loop
            if self._child:
                loop.add_reader(self._child.pipe.fileno(), self._hear)
        return loop

    def _ask(self) -> None:
        """Send what there is room for, and tell who waits for the import how that went."""
        if self._problem:
            self._give_up()
        elif self._child is None and (self._waiting or self._again or self._loading):
            assert self._loop
            self._child = self._new_child()
            self._started = time.monotonic()
            self._loop.add_reader(self._child.pipe.fileno(), self._hear)
        elif self._child:
            while request := self._next():
                if not self._asked:
                    self._heard = time.monotonic()
                number = next(self._numbers)
                self._asked[number] = request
                calls = request.calls
                self._child.ask(
                    number, [c.key for c in calls], [c.prompt for c in calls], [c.completion for c in calls]
                )
            if self._child.kind:
                self._loaded()
        self._set_timer()

    def _next(self) -> _Request | None:
        """What the child is asked next; None while it has enough to do."""
        while self._waiting and self._waiting[0].value.done():  # who asked has been cancelled
            self._waiting.popleft()
        while self._again and self._again[0].calls[0].value.done():
            self._again.popleft()
        kind = self._child.kind if self._child else None
        busy = bool(self._asked)
        if kind is None or any(request.alone for request in self._asked.values()):
            return None
        if self._again:
            return None if busy else self._again.popleft()
        room = self._max_concurrent - sum(len(request.calls) for request in self._asked.values())
        if not self._waiting or room <= 0 or (busy and not kind.concurrent):
            return None
        size = min(room, len(self._waiting)) if kind.batch else 1
        return _Request([self._waiting.popleft() for _ in range(size)])

    def _hear(self) -> None:
        """The child has said something, or its pipe has ended."""
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
                self._asked[number].begun = True
            elif isinstance(answer, str):
                self._fail(self._asked.pop(number), answer)
            else:
                for call, value in zip(self._asked.pop(number).calls, answer, strict=True):
                    _answer(call, value)

    def _set_timer(self) -> None:
        """Until when the child must have said something."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._child and (self._asked or self._child.kind is None):
            assert self._loop
            self._timer = self._loop.call_later(max(0.0, self._silence() - time.monotonic()), self._silent)

    def _silence(self) -> float:
        """When the child has been silent for too long."""
        assert self._child
        kind = self._child.kind
        if kind is None:
            return self._started + LOAD_LIMIT
        # An event loop cancels what is late itself, and says so. Only one that is blocked does not.
        return self._heard + self._time_limit + (GRACE if kind.concurrent else 0.0)

    def _silent(self) -> None:
        assert self._child
        if self._child.kind is None:
            self._problem = (
                f"rewards: {self._name!r}: its module was not imported within {LOAD_LIMIT:g} s{self._last_lines()}"
            )
        limit = f"{self._time_limit:g} s"
        concurrent = self._child.kind and self._child.kind.concurrent
        self._end_child(f"its event loop was blocked for over {limit}" if concurrent else f"no answer within {limit}")
        self._ask()

    def _end_child(self, reason: str) -> None:
        """Kill the child. What it was asked fails for this reason, or is asked again of the next one."""
        assert self._child and self._loop
        self._loop.remove_reader(self._child.pipe.fileno())
        self._child.kill()
        self._child = None
        asked = list(self._asked.values())
        self._asked.clear()
        # A process that was killed closes its pipe a moment later: it may die with a request already sent to it. That
        # is not to blame, until a fresh process does not live to begin with it either.
        if len(asked) == 1 and (asked[0].begun or asked[0].alone):
            self._fail(asked[0], reason)
        else:
            self._again += _one_by_one([call for request in asked for call in request.calls])

    def _fail(self, request: _Request, reason: str) -> None:
        if len(request.calls) > 1:
            self._again += _one_by_one(request.calls)
        else:
            _answer(request.calls[0], reason)

    def _give_up(self) -> None:
        """Nothing will be answered: everybody who waits raises the problem."""
        calls = [*self._waiting, *(call for request in self._again for call in request.calls)]
        self._waiting.clear()
        self._again.clear()
        for call in calls:
            if not call.value.done():
                call.value.set_exception(UserError(self._problem))
        self._loaded()

    def _loaded(self) -> None:
        for future in self._loading:
            if not future.done():
                future.set_result(None)
        self._loading.clear()

    def _last_lines(self) -> str:
        lines = self.printed()[-LAST_LINES:]
        return "\n".join([". It printed last:", *(f"  {line}" for line in lines)]) if lines else ""


def _answer(call: _Call, value: float | str) -> None:
    if not call.value.done():  # who asked has been cancelled
        call.value.set_result(value)


def _new_file() -> Path:
    number, path = tempfile.mkstemp(prefix="rft_reward_")
    os.close(number)
    return Path(path)


def _one_by_one(calls: Sequence[_Call]) -> list[_Request]:
    return [_Request([call], alone=True) for call in calls]
