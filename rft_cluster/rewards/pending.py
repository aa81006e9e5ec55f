"""Completions that wait for a reward function: which is asked about next, and which is to blame when its process dies.

    pending = Pending(max_concurrent=32)
    pending.add(calls)
    while request := pending.next(kind): ...        ask it
    pending.begun(number); pending.answered(number, [0.5])
    pending.died("its process died (exit code 7)")

Completions of all groups wait in one queue, so that groups which are scored at the same time share the limit:

| the function | calls at once | completions in a call |
|---|---|---|
| `def f(prompt, completion)` | 1 | 1 |
| `def f(prompts, completions)` | 1 | all that wait, up to the limit |
| `async def f(prompt, completion)` | up to the limit | 1 |
| `async def f(prompts, completions)` | any number | all that wait, up to what others have left of the limit |
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
    """One completion, and the value that is awaited for it: a float, or why there is none. `key` is its prompt's."""

    key: int
    prompt: Prompt
    completion: Completion
    value: "Future[float | str]"

    def answer(self, value: float | str) -> None:
        if not self.value.done():  # who asked has been cancelled
            self.value.set_result(value)


@dataclass(slots=True)
class Request:
    """One call of the function. `alone`: it is asked once more, with nothing beside it. `begun`: it runs."""

    number: int
    calls: Sequence[Call]
    alone: bool = False
    begun: bool = False


class Pending:
    """What waits, what is to be asked once more, and what has been asked."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._waiting: deque[Call] = deque()
        self._again: deque[Call] = deque()
        self._asked: dict[int, Request] = {}
        self._numbers = itertools.count()

    @property
    def asked(self) -> bool:
        """Whether answers are due."""
        return bool(self._asked)

    @property
    def left(self) -> bool:
        """Whether there is something to ask."""
        self._drop_cancelled()
        return bool(self._waiting or self._again)

    def add(self, calls: Iterable[Call]) -> None:
        self._waiting += calls

    def next(self, kind: Kind) -> Request | None:
        """What a function of this kind is asked now; None while it has enough to do."""
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
        """A batch that failed as a whole is asked once more, one by one."""
        request = self._asked.pop(number)
        if isinstance(answer, str):
            self._fail(request, answer)
        else:
            for call, value in zip(request.calls, answer, strict=True):
                call.answer(value)

    def died(self, reason: str) -> None:
        """The function's process died, or was killed. If it was asked one thing, that is to blame; else each is asked
        once more, alone.

        A process closes its pipe a moment after its end: it may die with a request sent to it that it has not begun.
        That is not to blame until a fresh process does not live to begin it either.
        """
        asked = list(self._asked.values())
        self._asked.clear()
        if len(asked) == 1 and (asked[0].begun or asked[0].alone):
            self._fail(asked[0], reason)
        else:
            self._again.extend(call for request in asked for call in request.calls)

    def give_up(self, error: Exception) -> None:
        """Nothing will be answered: everybody who waits raises this."""
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
