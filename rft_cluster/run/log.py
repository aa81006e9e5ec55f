"""`runs/NAME/log.txt`: the console output, each line with its time."""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.common.files import naming


class Log:
    """Lines with their times, buffered until `write_to` names a file."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._file: TextIO | None = None

    def add(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lines += [f"{now}  {line}\n" for line in text.splitlines()]
        if self._file:
            with naming(Path(self._file.name)):
                self._file.writelines(self._lines)
                self._file.flush()
            self._lines.clear()

    def add_last(self, text: str) -> None:
        """Add how the command ended. Errors of the log itself (a full disk) are ignored, so the cause stays visible."""
        with suppress(OSError):
            self.add(text)

    def write_to(self, path: Path) -> None:
        """Append the buffered lines to a file, and all later ones."""
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        self.add("")

    def close(self) -> None:
        if self._file:
            with suppress(OSError):
                self._file.close()


class _Copied:
    """A stream that also copies complete lines to a log."""

    def __init__(self, stream: TextIO, log: Log) -> None:
        self._stream, self._log = stream, log
        self._half = ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *whole, self._half = (self._half + text).split("\n")
        for line in whole:
            self._log.add(line.rpartition("\r")[2])  # only the last state of a progress bar
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def logged(command: str) -> Iterator[Log]:
    """Copy all output within this context, and how it ends, to a log. `command` is its first line."""
    log = Log()
    log.add(f"$ {command}")
    out: Any = _Copied(sys.stdout, log)
    err: Any = _Copied(sys.stderr, log)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield log
    except (UserError, ClusterError) as error:
        log.add_last(f"error: {error}")
        raise
    except KeyboardInterrupt as stop:
        log.add_last(str(stop) or "interrupted")
        raise
    except Exception:
        log.add_last(traceback.format_exc())
        raise
    finally:
        log.close()
