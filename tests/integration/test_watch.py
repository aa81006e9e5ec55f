"""`watch` in a real terminal, while another process holds the run."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from rft_cluster.run.lock import locked
from tests.unit.run.begun import begun

SCREEN, NO_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"  # the terminal's second screen, shown and left


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *words: str | Path, columns: int) -> None:
        self.shown = b""
        self._process, self._terminal = pty.fork()
        if not self._process:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "rft_cluster.watch", *map(str, words)])
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def wait_for(self, text: bytes) -> None:
        end = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.shown += os.read(self._terminal, 65_536)

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def end(self) -> int:
        """The exit code."""
        try:
            while data := os.read(self._terminal, 65_536):
                self.shown += data
        except OSError:  # the other end is closed
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])


@pytest.mark.parametrize("columns", [40, 130])
def test_ctrl_c_gives_the_terminal_back(tmp_path: Path, columns: int):
    folder = begun(tmp_path)
    with locked(folder):
        terminal = Terminal(folder, columns=columns)
        terminal.wait_for(b"in progress")
        terminal.press(b"\x03")
        assert terminal.end() == 0
    shown = terminal.shown
    assert shown.index(SCREEN) < shown.index(b"in progress") < shown.index(NO_SCREEN)
    assert b"is no longer watched" in shown[shown.index(NO_SCREEN) :].replace(b"\r\n", b"")
    assert b"Traceback" not in shown
