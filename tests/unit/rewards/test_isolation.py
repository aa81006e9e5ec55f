"""A user's reward function in a process of its own: what it breaks is one completion's reward, and never a 0."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from some_prompt import some_prompt

from rft_cluster.common.errors import UserError
from rft_cluster.messages import Completion
from rft_cluster.rewards.isolation import IsolatedFunction
from tests.unit.rewards.own_functions import PROMPT, completion_of

LIMIT = 1.0
OBEYS = "tests.unit.rewards.own_functions:obeys"


def completions(*texts: str) -> list[Completion]:
    return [completion_of(text) for text in texts]


def gone(pid: int) -> bool:
    """Return True if a process has ended, or ends within seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):  # it ended before or after the file was opened
            return True
        time.sleep(0.05)
    return False


def ask(function: IsolatedFunction, *texts: str) -> list:
    """The values of one group."""
    return asyncio.run(function(PROMPT, completions(*texts)))


@pytest.fixture(scope="module")
def function():
    isolated = IsolatedFunction(OBEYS, LIMIT, 32)
    yield isolated
    isolated.close()


def test_values_come_in_order_and_from_one_other_process(function):
    first, value, second, true = ask(function, "pid", "number -1.5", "pid", "true")
    assert first == second != os.getpid()
    assert (value, true) == (-1.5, 1.0)
    assert ask(function, "pid") == [first]
    assert ask(function) == []


def test_prompt_and_completion_arrive_whole(function):
    assert ask(function, "prompt") == [1.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise", "KeyError: 'petal' (own_functions.py, line "),
        ("exit", "SystemExit: enough (own_functions.py, line "),
        ("nothing", "returned None, not a finite number"),
        ("text", "returned '0.5', not a finite number"),
        ("list", "returned [0.5], not a finite number"),
        ("number nan", "returned nan, not a finite number"),
        ("number inf", "returned inf, not a finite number"),
        ("number -inf", "returned -inf, not a finite number"),
        ("number 1e200", "returned 1e+200, not a finite number"),
        ("whole", "returned 1000"),
    ],
)
def test_what_is_no_number_is_said_and_the_process_lives(function, text, reason):
    before, answer, after = ask(function, "pid", text, "pid")
    assert isinstance(answer, str) and answer.startswith(reason)
    assert len(answer) < 300
    assert before == after


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hang", "no answer within 1 s"),
        ("native", "no answer within 1 s"),
        ("die", "its process died (exit code 7)"),
        ("segfault", "its process died (SIGSEGV)"),
    ],
)
def test_a_hang_or_a_crash_costs_its_own_completion(function, text, reason):
    start = time.monotonic()
    before, answer, after, last = ask(function, "pid", text, "pid", "number 3")
    assert (answer, last) == (reason, 3.0)
    assert before != after, "a new process"
    with pytest.raises(ProcessLookupError):
        os.kill(int(before), 0)
    assert time.monotonic() - start < LIMIT + 15  # two would hang 2 s, a group of four 4


def test_several_in_a_group_each_have_their_own_limit(function):
    reasons = ask(function, "die", "hang", "", "raise", "die")
    assert reasons[:3] == ["its process died (exit code 7)", "no answer within 1 s", 0.25]
    assert reasons[3].startswith("KeyError") and reasons[4] == "its process died (exit code 7)"


def test_a_death_between_two_groups_costs_nothing(function):
    (before,) = ask(function, "pid")
    assert ask(function, "die later") == [0.25]
    assert gone(int(before))
    assert ask(function, "number 1", "number 2") == [1.0, 2.0]


def test_a_death_with_a_group_in_its_pipe_costs_nothing(function):
    """The process is stopped when the group is sent, and killed before it can take it: no completion is to blame."""
    (child,) = ask(function, "pid")
    os.kill(int(child), signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (int(child), signal.SIGKILL))
    killer.start()
    assert ask(function, "number 1", "number 2") == [1.0, 2.0]


def test_what_it_started_is_killed_with_it(function, tmp_path):
    (answer,) = ask(function, f"spawn {tmp_path / 'pid'}")
    assert answer == "no answer within 1 s"
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_it_prints_is_in_this_process_s_output_at_once(monkeypatch, capfd):
    """The actor's log is a file, and a process is killed at its end: a buffer's content would be lost."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    function = IsolatedFunction(OBEYS, LIMIT, 32)
    assert ask(function, "print petal") == [0.25]
    assert capfd.readouterr().out == "petal\n"
    function.close()


def test_the_module_is_found_as_here(tmp_path, monkeypatch):
    """A module in a folder that only this process has in sys.path, relative to its working directory."""
    (tmp_path / "my_reward.py").write_text("import os\ndef f(p, c): return float(os.getcwd() == p.example_id)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    function = IsolatedFunction("my_reward:f", LIMIT, 32)
    here = some_prompt("train/0/0", str(tmp_path))
    assert asyncio.run(function(here, completions("x"))) == [1.0]
    function.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_dependency\n", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("import os\nos._exit(5)\n", r"its import ends the process \(exit code 5\)"),
        ("def g(p, c): return 1\n", "has no function 'f'"),
    ],
)
def test_a_failed_import_is_for_the_user_to_fix(tmp_path, monkeypatch, source, message):
    (tmp_path / "broken_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    function = IsolatedFunction("broken_reward:f", LIMIT, 32)
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            ask(function, "x")
    function.close()


@pytest.mark.parametrize(
    ("name", "busy"), [("obeys", "number 1"), ("obeys", "native"), ("judge", "pid"), ("judge", "retry")]
)
def test_a_process_whose_parent_was_killed_ends(name, busy):
    """Idle, at once, whatever its function catches; while it hangs in native code, after its time limit and a grace."""
    script = f"""
import asyncio, os, sys, threading
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from rft_cluster.rewards.isolation import IsolatedFunction
from tests.unit.rewards.own_functions import PROMPT, completion_of
f = IsolatedFunction("tests.unit.rewards.own_functions:{name}", 1.0, 32)
print(int(asyncio.run(f(PROMPT, [completion_of("pid")]))[0]), flush=True)
threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()
asyncio.run(f(PROMPT, [completion_of({busy!r})]))
threading.Event().wait()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert gone(int(result.stdout))
