"""The process of a user's own reward function: the code that runs in it, and the scorer's handle on it.

Parent and child talk through a pipe. The child first sends the kind of the imported function, or the reason why the
import failed. Each request is one call of the function, which the child answers twice: at its begin, and with values.

    parent                                                        child
                                                                  Kind(batch=False, concurrent=True)
    Ask(7, keys=[3], prompts={3: Prompt(...)}, completions=[...])
                                                                  (7, None)          the call has begun
                                                                  (7, [0.5])         or (7, "KeyError: ...")

A prompt with its image is sent once, with its first completion. The child keeps it under its key until a `Forget`.
"""

import asyncio
import faulthandler
import inspect
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from rft_cluster.common.errors import UserError
from rft_cluster.common.function import is_async
from rft_cluster.common.lookup import find_function
from rft_cluster.messages import Completion, Prompt

GRACE = 2.0  # seconds past the time limit after which an event loop counts as blocked
# Seconds past the time limit after which a child ends itself, in case there is no parent any more to kill it.
ORPHAN_GRACE = 3.0
LARGEST = 1e100  # larger values overflow in sums of squares
LONGEST = 200  # characters of a reason
Answer = list[float | str] | str  # a value or a reason for each completion, or one reason for all


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of a function. `batch`: takes lists of prompts and completions. `concurrent`: is `async`."""

    batch: bool
    concurrent: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """One call: completions and the keys of their prompts. `prompts`: those that the child does not have yet."""

    number: int
    keys: list[int]
    prompts: dict[int, Prompt]
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Forget:
    """The prompt under this key is no longer needed."""

    key: int


def kind_of(function: Callable[..., Any], name: str) -> Kind:
    """The kind of a function, from its declaration: a batch by parameter names, concurrency by `async def`.

    `(prompts, completions)` takes a batch; any other names, e.g. `(prompt, completion)`, take one completion.

    Raises:
        UserError: the names mix the two.
    """
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C, without a signature
        names = []
    plural = set(names) & {"prompts", "completions"}
    if len(plural) == 1:
        raise UserError(
            f"rewards: {name!r} takes {', '.join(names)}: a function of one completion takes (prompt, completion), "
            f"one of a batch (prompts, completions)"
        )
    return Kind(batch=bool(plural), concurrent=is_async(function))


class Child:
    """A process that serves one function. It starts at once, and sends messages through `pipe`.

    Args:
        time_limit: seconds for one call.
        output: a file for the function's output; empty for this process's own output.
    """

    def __init__(self, name: str, time_limit: float, output: str) -> None:
        # Do not fork: that would copy locks of Ray's and torch's threads in whatever state they are.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.kind: Kind | None = None  # None until the child has imported the function
        self._known: set[int] = set()  # keys of the prompts that the child has
        self._process = context.Process(
            target=_serve, args=(name, theirs, time_limit, output), name=f"reward {name}", daemon=True
        )
        # Only the parent handles Ctrl-C, also before the child is in a process group of its own.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        # Send in a thread: a pipe holds 64 kB, so writing an image to a stuck child would block.
        self._outbox: SimpleQueue[Ask | Forget | None] = SimpleQueue()
        self._sender = threading.Thread(target=_send_all, args=(self.pipe, self._outbox), daemon=True)
        self._sender.start()

    def ask(self, number: int, prompts: Sequence[tuple[int, Prompt]], completions: list[Completion]) -> None:
        """Send a request. `prompts`: (key, prompt) of each completion. A prompt is sent only the first time."""
        new = {key: prompt for key, prompt in prompts if key not in self._known}
        self._known.update(new)
        self._outbox.put(Ask(number, [key for key, _ in prompts], new, completions))

    def forget(self, key: int) -> None:
        if key in self._known:
            self._known.remove(key)
            self._outbox.put(Forget(key))

    def kill(self) -> None:
        """End the process and its subprocesses."""
        assert self._process.pid
        with suppress(ProcessLookupError):  # the process has ended, or has not made its group yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._outbox.put(None)
        self._sender.join(timeout=1)  # before another file can get the pipe's number
        self.pipe.close()

    def ending(self) -> str:
        """How the process ended, as text. Call this after the end of its pipe."""
        self._process.join(timeout=1)  # the pipe closes a moment before the process ends
        code = self._process.exitcode
        return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _send_all(pipe: Connection, outbox: "SimpleQueue[Ask | Forget | None]") -> None:
    with suppress(OSError):  # the child has ended; the listener sees that by the pipe, too
        while (message := outbox.get()) is not None:
            pipe.send(message)


# --- in the child


def _serve(name: str, pipe: Connection, time_limit: float, output: str) -> None:
    """Import the function, then answer requests until the parent ends."""
    os.setsid()  # a group of its own, to be killed as a whole, and without the terminal's Ctrl-C
    _print_to(output)
    try:
        function = find_function(name, {}, "rewards")
        kind = kind_of(function, name)
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        pipe.send(str(error) if isinstance(error, UserError) else f"rewards: {name!r}: {reason(error)}")
        return
    pipe.send(kind)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        if kind.concurrent:
            asyncio.run(_serve_concurrently(function, kind, pipe, time_limit))
        else:
            _serve_in_turn(function, kind, pipe, time_limit)
    _end()


def _end() -> None:
    """End this process, with what the function has started, after the end of the parent."""
    os.killpg(0, signal.SIGKILL)


def _print_to(path: str) -> None:
    """Print to this file, or to the parent's output if `path` is empty; line by line, as a kill flushes nothing."""
    for stream in (sys.stdout, sys.stderr):
        if path:
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr] # typed as TextIO, is a TextIOWrapper


def _serve_in_turn(function: Callable[..., Any], kind: Kind, pipe: Connection, time_limit: float) -> None:
    known: dict[int, Prompt] = {}
    while True:
        if asked := _taken_in(pipe.recv(), known):
            number, prompts, completions = asked
            pipe.send((number, None))
            # This needs no interpreter lock, so it ends even native code that hangs, if the parent has ended.
            faulthandler.dump_traceback_later(time_limit + ORPHAN_GRACE, exit=True)
            try:
                answer = _checked(_call(function, kind, prompts, completions), kind, len(completions))
            except BaseException as error:  # noqa: BLE001 - a user's function may raise anything; the reason is recorded
                answer = reason(error)
            faulthandler.cancel_dump_traceback_later()
            pipe.send((number, answer))


async def _serve_concurrently(function: Callable[..., Any], kind: Kind, pipe: Connection, time_limit: float) -> None:
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    known: dict[int, Prompt] = {}
    running: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references to tasks

    def hear() -> None:
        try:
            while pipe.poll():
                if asked := _taken_in(pipe.recv(), known):
                    task = loop.create_task(_answer(function, kind, pipe, time_limit, *asked))
                    running.add(task)
                    task.add_done_callback(running.discard)
        except (EOFError, OSError):
            gone.set()

    def beat() -> None:
        faulthandler.dump_traceback_later(time_limit + ORPHAN_GRACE, exit=True)
        loop.call_later(1, beat)

    loop.add_reader(pipe.fileno(), hear)
    beat()
    await gone.wait()
    _end()  # here, because asyncio would wait for calls that catch their cancellation


async def _answer(
    function: Callable[..., Any],
    kind: Kind,
    pipe: Connection,
    time_limit: float,
    number: int,
    prompts: list[Prompt],
    completions: list[Completion],
) -> None:
    """Run one call, and cancel it when its time is over. The time begins with its first step."""
    task, is_late = asyncio.current_task(), False

    def late() -> None:
        nonlocal is_late
        is_late = True
        pipe.send((number, f"no answer within {time_limit:g} s"))
        assert task
        task.cancel()

    pipe.send((number, None))
    timer = asyncio.get_running_loop().call_later(time_limit, late)
    try:
        answer = _checked(await _call(function, kind, prompts, completions), kind, len(completions))
    except BaseException as error:  # noqa: BLE001 - a user's function may raise anything; the reason is recorded
        answer = reason(error)
    timer.cancel()
    if not is_late:  # a function that catches its cancellation must not answer twice
        pipe.send((number, answer))


def _taken_in(message: Ask | Forget, known: dict[int, Prompt]) -> tuple[int, list[Prompt], list[Completion]] | None:
    """Number, prompts and completions of an `Ask`; None for a `Forget`."""
    if isinstance(message, Forget):
        del known[message.key]
        return None
    known.update(message.prompts)
    return message.number, [known[key] for key in message.keys], message.completions


def _call(function: Callable[..., Any], kind: Kind, prompts: list[Prompt], completions: list[Completion]) -> Any:
    if kind.batch:
        return function(prompts=prompts, completions=completions)
    return function(prompts[0], completions[0])


def _checked(value: Any, kind: Kind, count: int) -> Answer:
    if not kind.batch:
        return [_number(value)]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return f"returned {value!r}, not a list of {count} numbers"[:LONGEST]
    values = list(value)
    if len(values) != count:
        return f"returned {len(values)} values for {count} completions"
    return [_number(one) for one in values]


def _number(value: Any) -> float | str:
    """The value as a float, or the reason why it is not one."""
    if inspect.iscoroutine(value):
        value.close()
        return "returned a coroutine: define the function itself with async def"
    try:
        number = float("nan") if isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    return number if abs(number) <= LARGEST else f"returned {value!r}, not a finite number"[:LONGEST]


def reason(error: BaseException) -> str:
    """Kind, message and place of an exception, on one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{text[:LONGEST]} ({os.path.basename(place.filename)}, line {place.lineno})"
