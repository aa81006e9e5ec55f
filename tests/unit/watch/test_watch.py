"""The command: live in a terminal while the run goes on, else one view; how it ends."""

import io

import pytest
from rich.console import Console

import rft_cluster.watch.__main__ as command
from rft_cluster.run.lock import locked
from tests.unit.run.begun import begun

SCREEN, NO_SCREEN = "\x1b[?1049h", "\x1b[?1049l"  # the terminal's second screen, shown and left


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """A terminal of 100 columns, in memory."""
    file = io.StringIO()
    monkeypatch.setattr(
        command, "Console", lambda: Console(file=file, force_terminal=True, width=100, height=30, color_system=None)
    )
    return file


def paused(monkeypatch, *events) -> list[float]:
    """Let each pause between two views do one of `events`. Returns the pauses' seconds."""
    seconds, left = [], iter(events)

    def sleep(length: float) -> None:
        seconds.append(length)
        next(left)()

    monkeypatch.setattr(command.time, "sleep", sleep)
    return seconds


def interrupted() -> None:
    raise KeyboardInterrupt


def test_without_a_terminal_one_view_is_printed(tmp_path, capsys):
    folder = begun(tmp_path)
    for words in ([str(folder)], [str(folder), "--once"]):
        assert command.main(words) == 0
        out = capsys.readouterr().out
        assert "stopped  ·  0 of 80 steps" in out and "\x1b" not in out
        assert 20 < len(out.splitlines()) <= command.LINES


def test_a_terminal_that_cannot_move_its_cursor_gets_one_view(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    folder = begun(tmp_path)
    with locked(folder):
        assert command.main([str(folder)]) == 0
    assert terminal.getvalue().count("in progress") == 1 and SCREEN not in terminal.getvalue()


def test_once_in_a_terminal_leaves_the_view_there(tmp_path, terminal):
    folder = begun(tmp_path)
    with locked(folder):
        assert command.main([str(folder), "--once"]) == 0
    assert "in progress" in terminal.getvalue() and SCREEN not in terminal.getvalue()


def test_ctrl_c_ends_it_and_gives_the_screen_back(tmp_path, terminal, monkeypatch, capsys):
    folder = begun(tmp_path)
    pauses = paused(monkeypatch, lambda: None, interrupted)
    with locked(folder):
        assert command.main([str(folder)]) == 0
    shown = terminal.getvalue()
    assert shown.count("in progress") == len(pauses) == 2
    assert shown.index(SCREEN) < shown.index("in progress") < shown.index(NO_SCREEN)
    assert capsys.readouterr() == (f"{folder} is no longer watched\n", "")


def test_it_ends_with_the_run_and_leaves_the_last_view(tmp_path, terminal, monkeypatch):
    folder = begun(tmp_path)
    lock = locked(folder)
    lock.__enter__()
    paused(monkeypatch, lambda: lock.__exit__(None, None, None))
    assert command.main([str(folder)]) == 0
    before, after = terminal.getvalue().split(NO_SCREEN)
    assert "in progress" in before and "stopped" in after


def test_after_its_first_view_it_takes_a_hundredth_of_a_core(tmp_path, terminal, monkeypatch):
    folder, times = begun(tmp_path), iter([10.0, 20.0, 20.25, 21.0, 21.005])
    monkeypatch.setattr(command.time, "process_time", lambda: next(times))
    pauses = paused(monkeypatch, lambda: None, lambda: None, interrupted)
    with locked(folder):
        command.main([str(folder)])
    assert pauses == [command.SHORTEST, 25.0, command.SHORTEST]


def test_a_run_that_starts_is_waited_for(tmp_path, terminal, monkeypatch):
    folder = tmp_path / "mine"
    paused(monkeypatch, lambda: begun(tmp_path), interrupted)
    with locked(folder):
        assert command.main([str(folder)]) == 0
    assert "the run starts" in terminal.getvalue() and "in progress" in terminal.getvalue()


def test_a_start_that_fails_ends_the_waiting(tmp_path, terminal, monkeypatch, capsys):
    folder = tmp_path / "mine"
    lock = locked(folder)
    lock.__enter__()
    paused(monkeypatch, lambda: lock.__exit__(None, None, None))
    assert command.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: there is no folder {folder}")


@pytest.mark.parametrize("inside", [[], ["--once"]])
def test_a_folder_that_is_no_run_gets_one_line(tmp_path, capsys, inside):
    begun(tmp_path)
    assert command.main([str(tmp_path), *inside]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not the folder of a run. It holds runs: mine\n"
