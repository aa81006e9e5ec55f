"""Exit codes and messages of commands for exceptions, and for an output that is closed or full."""

import builtins
import errno
import os
import subprocess
import sys

import pytest

from rft_cluster.common.errors import FIXABLE, PASSING, ClusterError, NoRoom, Taken, Unavailable, UserError, exit_code


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


def errors_of(number: int) -> list[OSError]:
    """Errors as system calls raise them: with a path, with two, or, from a write, with none."""
    text = os.strerror(number)
    return [OSError(number, text, "/some/file"), OSError(number, text, "/a", None, "/b"), OSError(number, text)]


@pytest.mark.parametrize("number", sorted(FIXABLE), ids=errno.errorcode.get)
def test_what_the_system_refuses_is_one_line(capsys, number):
    for error in errors_of(number):
        assert exit_code(raising(error)) == (3 if number in PASSING else 2)
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert os.strerror(number) in message
        assert error.filename is None or str(error.filename) in message


@pytest.mark.parametrize("number", sorted(set(errno.errorcode) - set(FIXABLE)), ids=errno.errorcode.get)
def test_other_errors_of_the_system_are_defects(number):
    for error in errors_of(number):
        with pytest.raises(type(error)):
            exit_code(raising(error))


def test_defects_keep_their_traceback():
    kinds = [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    wanted = [k for k in kinds if not issubclass(k, OSError | UnicodeError | ExceptionGroup)]
    assert len(wanted) > 20
    for kind in wanted:
        with pytest.raises(kind):
            exit_code(raising(kind("x")))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("data.path: wrong"), 2),
        (ClusterError("learner-0: no answer"), 3),
        (Unavailable("the hub cannot be reached"), 3),
        (NoRoom("the run needs 3 CPUs, the cluster has 2"), 2),
        (Taken("its resources are taken"), 3),
    ],
)
def test_an_error_that_is_no_defect_is_one_message(capsys, error, code):
    assert exit_code(raising(error)) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_text_of_a_strangers_data_does_not_control_the_terminal(capsys):
    assert exit_code(raising(UserError("class '\x1b[2Jrose' is there twice:\n  می\u200cخواهم"))) == 2
    assert capsys.readouterr().err == "error: class '\\x1b[2Jrose' is there twice:\n  می\u200cخواهم\n"


def test_the_works_own_code_is_kept():
    assert [exit_code(lambda: None), exit_code(lambda: 1)] == [0, 1]


def program(work: str, redirect: str, **environment: str) -> tuple[int, str]:
    """Exit code and standard error of a program whose work is `work`, its output redirected by a shell."""
    source = (
        f"import sys; from rft_cluster.common.errors import exit_code\ndef work():\n  {work}\nsys.exit(exit_code(work))"
    )
    # Bash alone says what the first program of a pipe ended with.
    command = f'"$0" -c "$1" {redirect}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, source],
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("redirect", ["| true", "2>&1 | true"])
def test_an_output_that_nobody_reads_ends_the_program_quietly(unbuffered, lines, redirect):
    # The reader may be slow to go on a busy machine: the pipe itself says when it has gone.
    work = f"import select; gone = select.poll(); gone.register(1, 0); gone.poll(); [print(n) for n in range({lines})]"
    assert program(work, redirect, PYTHONUNBUFFERED=unbuffered) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_an_output_on_a_full_disk_is_told_once(unbuffered, lines):
    code, error = program(f"[print(n) for n in range({lines})]", "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert code == 2
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1


def test_a_broken_pipe_that_is_not_the_output_is_a_defect():
    code, error = program("raise BrokenPipeError(32, 'of a socket')", "| cat > /dev/null")
    assert code == 1
    assert "Traceback" in error


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_error(redirect):
    assert program("print(1)", redirect)[0] == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_a_name_shows_its_code(encoding):
    text = "r\\u00f6se \\u8594\\u8587 \\U0001f339"
    assert program(f"print('{text}'); print('{text}', file=sys.stderr)", "", PYTHONIOENCODING=encoding)[0] == 0


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        ("return 7", 7, ""),
        ("return 0", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('why')", 1, "why"),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_command_ends_with_its_code_before_libraries_are_torn_down(main, code, said):
    """An object of a library whose end is a crash, as that of Ray's core can be."""
    script = f"""
import atexit, ctypes, sys
from rft_cluster.common.errors import end_with

class Crashing:
    def __del__(self, read=ctypes.string_at):
        read(0)

sys.modules["kept"] = kept = Crashing()

def main():
    atexit.register(print, "the handlers are called")
    print("the last line of an output that is buffered")
    {main}

end_with(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr
    assert done.stdout == "the last line of an output that is buffered\nthe handlers are called\n"
