"""A reward function of the user's own, in a process of its own.

    brevity = IsolatedFunction("my_package.my_module:brevity", time_limit=10.0)
    values = brevity(prompt, completions)       # for each a float, or a text that says why there is none

There it may raise, return what is no number, hang (in native code, too), or take the interpreter down: each costs the
one completion that it happened on. A group crosses to the process once, and so does its image; answers come back one
by one, each with the whole time limit. After a hang or a crash the process is killed with all that it started, and a
new one goes on with the next completion.

Not a library's process pool: there a task has one answer and one limit, so an image would cross for each completion;
pebble's, otherwise fit, is broken for good by a worker that dies between two tasks.
"""

import faulthandler
import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import find_function
from rft_cluster.messages import Completion, Prompt
from rft_cluster.rewards import REWARDS, RewardFunction

LOAD_LIMIT = 300.0  # seconds that the import of the user's module may take
TAKE_LIMIT = 30.0  # seconds in which a living process takes a group that was sent to it
ORPHAN_GRACE = 3.0  # seconds past the time limit after which a process without a parent to kill it ends itself
LARGEST = 1e100  # sums of squares of larger ones overflow
LONGEST = 200  # characters of a reason
TAKEN = "taken"  # what a child answers to a group before it looks at the first completion


class IsolatedFunction:
    """Calls the function of a dotted path in a child process, which starts at once and imports it there.

    The child has this process's sys.path, working directory and environment, so it finds what `find_function` finds.
    """

    def __init__(self, name: str, time_limit: float) -> None:
        self._name, self._time_limit = name, time_limit
        self._child = _Child(name, time_limit)

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float | str]:
        """For each completion, in order, the function's value, or why there is none.

        Raises:
            UserError: the child cannot import the function.
        """
        answers: list[float | str] = []
        while len(answers) < len(completions):
            answers += self._until_killed(prompt, completions[len(answers) :])
        return answers

    def wait_until_ready(self) -> None:
        """Until the child has imported the function; where it died since the last group, until a new one has.

        Raises:
            UserError: it cannot be imported.
        """
        if self._child.problem == "" and self._child.pipe.poll(0):  # nothing is due, so this is its end
            self._replace_child()
        if self._child.load():
            raise UserError(f"rewards: {self._name!r} cannot be loaded: {self._child.problem}")

    def close(self) -> None:
        """End the child and what it started."""
        self._child.kill()

    def _hand_over(self, prompt: Prompt, completions: Sequence[Completion]) -> bool:
        """Whether the child has taken the group, so that what happens from now on is a completion's doing."""
        self.wait_until_ready()
        try:
            self._child.pipe.send((prompt, completions))
            return self._child.pipe.poll(TAKE_LIMIT) and self._child.pipe.recv() == TAKEN
        except (EOFError, OSError):
            return False

    def _replace_child(self) -> None:
        self._child.kill()
        self._child = _Child(self._name, self._time_limit)

    def _until_killed(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float | str]:
        """The answers, at most up to the first completion for which the child had to be replaced."""
        answers: list[float | str] = []
        if not self._hand_over(prompt, completions):
            # A process that was killed closes its pipe a moment later: it may die with the group already sent to it.
            # None of the completions is to blame, until a fresh process does not live to take them either.
            self._replace_child()
            if not self._hand_over(prompt, completions):
                answers.append(f"its process died ({self._child.ending()})")
                self._replace_child()
                return answers
        pipe = self._child.pipe
        try:
            while len(answers) < len(completions):
                if not pipe.poll(self._time_limit):
                    answers.append(f"no answer within {self._time_limit:g} s")
                    self._replace_child()
                    break
                answers.append(pipe.recv())
        except (EOFError, OSError):
            answers.append(f"its process died ({self._child.ending()})")
            self._replace_child()
        return answers


class _Child:
    """A process that serves one function; see `_serve`."""

    def __init__(self, name: str, time_limit: float) -> None:
        # A fork would copy the locks of this process's threads, of Ray and torch, as they happen to be held.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.problem: str | None = None  # with the import: none if empty, and None while it is not over
        self._process = context.Process(
            target=_serve, args=(name, theirs, time_limit), name=f"reward {name}", daemon=True
        )
        # Ctrl-C is the parent's alone, also before the child is a group of its own.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def load(self) -> str:
        """Wait for the import. Returns `problem`; a child that has one is of no use and was killed."""
        if self.problem is None:
            try:
                late = f"not imported within {LOAD_LIMIT:g} s"
                self.problem = self.pipe.recv() if self.pipe.poll(LOAD_LIMIT) else late
            except (EOFError, OSError):
                self.problem = f"the import ends the process ({self.ending()})"
            if self.problem:
                self.kill()
        return self.problem or ""

    def kill(self) -> None:
        assert self._process.pid
        with suppress(ProcessLookupError):  # it is gone, or has not made its group yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def ending(self) -> str:
        """How it ended, after its pipe did."""
        self._process.join(timeout=1)  # the pipe is closed a moment earlier
        code = self._process.exitcode
        return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _serve(name: str, pipe: Connection, time_limit: float) -> None:
    """The child: import the function, then answer a group at a time until the parent is gone."""
    os.setsid()  # a group, to be killed as a whole; and Ctrl-C is the parent's alone
    try:
        function = find_function(name, REWARDS, "rewards")
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        traceback.print_exc()
        pipe.send(str(error) if isinstance(error, UserError) else _reason(error))
        return
    pipe.send("")
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while True:
            prompt, completions = pipe.recv()
            pipe.send(TAKEN)
            for completion in completions:
                # Needs no lock of the interpreter's, so it ends what hangs in native code, should the parent be gone.
                faulthandler.dump_traceback_later(time_limit + ORPHAN_GRACE, exit=True)
                answer = _call(function, prompt, completion)
                faulthandler.cancel_dump_traceback_later()
                pipe.send(answer)


def _call(function: RewardFunction, prompt: Prompt, completion: Completion) -> float | str:
    try:
        value = function(prompt, completion)
        try:
            number = float("nan") if isinstance(value, str | bytes | bytearray) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        return number if abs(number) <= LARGEST else f"returned {value!r}, not a finite number"[:LONGEST]
    except BaseException as error:  # noqa: BLE001 - a user's function may raise anything, and the reason is recorded
        return _reason(error)


def _reason(error: BaseException) -> str:
    """Kind, message and place of an exception, on one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{text[:LONGEST]} ({os.path.basename(place.filename)}, line {place.lineno})"
