"""The queue of completions for a reward function: choose the next call, and find the one that made the process die.

    pending = Pending(max_concurrent=32)
    pending.add(calls)
    while request := pending.next(kind): ...        ask it
    pending.begun(number); pending.answered(number, [0.5])
    pending.died("its process died (exit code 7)")

All groups share one queue and the limit:

| the function | calls at once | completions in a call |
|---|---|---|
| `def f(prompt, completion)` | 1 | 1 |
| `def f(prompts, completions)` | 1 | all that wait, up to the limit |
| `async def f(prompt, completion)` | up to the limit | 1 |
| `async def f(prompts, completions)` | any number | all that wait, up to the limit minus those of other calls |
"""

import itertools
from asyncio import Future
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rft_cluster.messages import Completion, Prompt
from rft_cluster.rewards.child import Answer, Kind


@dataclass(frozen=True, slots=True)
class Call:
    """One completion, and the future of its value: a float, or the reason why there is none.

    `key`: the process's key for the prompt.
    """

    key: int
    prompt: Prompt
    completion: Completion
    value: "Future[float | str]"

    def answer(self, value: float | str) -> None:
        if not self.value.done():  # a cancelled future has no caller that waits
            self.value.set_result(value)


@dataclass(slots=True)
class Request:
    """One call of the function. `begun`: the function runs. `alone`: a retry, during which nothing else runs."""

    number: int
    calls: Sequence[Call]
    alone: bool = False
    begun: bool = False


class Pending:
    """Three stages: waiting calls, calls to retry, and requests in flight."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._waiting: deque[Call] = deque()
        self._again: deque[Call] = deque()
        self._asked: dict[int, Request] = {}
        self._numbers = itertools.count()

    @property
    def asked(self) -> bool:
        """True if a request is in flight."""
        return bool(self._asked)

    @property
    def left(self) -> bool:
        """True if calls wait, for the first time or for a retry."""
        self._drop_cancelled()
        return bool(self._waiting or self._again)

    def add(self, calls: Iterable[Call]) -> None:
        self._waiting += calls

    def next(self, kind: Kind) -> Request | None:
        """The next request for a function of this kind; None while the limit is reached."""
        if not self.left or any(request.alone for request in self._asked.values()):
            return None
        if self._again:
            return None if self._asked else self._ask([self._again.popleft()], alone=True)
        room = self._max_concurrent - sum(len(request.calls) for request in self._asked.values())
        if not self._waiting or room <= 0 or (self._asked and not kind.concurrent):
            return None
        size = min(room, len(self._waiting)) if kind.batch else 1
        return self._ask([self._waiting.popleft() for _ in range(size)])

    def begun(self, number: int) -> None:
        self._asked[number].begun = True

    def answered(self, number: int, answer: Answer) -> None:
        """Record values, or one reason for the whole request. A batch that failed as a whole is retried one by one."""
        request = self._asked.pop(number)
        if isinstance(answer, str):
            self._fail(request, answer)
        else:
            for call, value in zip(request.calls, answer, strict=True):
                call.answer(value)

    def died(self, reason: str) -> None:
        """Handle the death of the process. Its only request fails; if there were several, each is retried alone.

        A request that had not begun is retried, too, because a process closes its pipe a moment after its end and may
        already be dead when a request is sent. It fails if the next process dies as well.
        """
        asked = list(self._asked.values())
        self._asked.clear()
        if len(asked) == 1 and (asked[0].begun or asked[0].alone):
            self._fail(asked[0], reason)
        else:
            self._again.extend(call for request in asked for call in request.calls)

    def give_up(self, error: Exception) -> None:
        """Give up: every caller raises `error`."""
        for call in (*self._waiting, *self._again):
            if not call.value.done():
                call.value.set_exception(error)
        self._waiting.clear()
        self._again.clear()

    def _ask(self, calls: Sequence[Call], alone: bool = False) -> Request:
        request = Request(next(self._numbers), calls, alone)
        self._asked[request.number] = request
        return request

    def _fail(self, request: Request, reason: str) -> None:
        if len(request.calls) > 1:
            self._again += request.calls
        else:
            request.calls[0].answer(reason)

    def _drop_cancelled(self) -> None:
        for queue in (self._waiting, self._again):
            while queue and queue[0].value.done():
                queue.popleft()
