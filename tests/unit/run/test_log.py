import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.run.log import logged
from rft_cluster.run.records import append

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def lines(path) -> list[str]:
    found = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(TIME, line) for line in found)
    return [re.sub(TIME, "", line) for line in found]


def test_what_the_console_shows_is_in_the_log_with_times(tmp_path, capsys):
    file = tmp_path / "log.txt"
    for _ in range(2):  # a run that is resumed goes on with its log
        with logged("launch --config digits") as log:
            print("before there is a folder")
            assert not file.exists() or _ == 1
            log.write_to(file)
            print("step ", end="")
            print("1/2\nstep 2/2")
            print("a warning", file=sys.stderr)
            sys.stderr.write("\r 10 %\r100 %\n")
    said = ["$ launch --config digits", "before there is a folder", "step 1/2", "step 2/2", "a warning", "100 %"]
    assert lines(file) == said * 2
    printed = capsys.readouterr()
    assert printed.out == "before there is a folder\nstep 1/2\nstep 2/2\n" * 2
    assert printed.err == "a warning\n\r 10 %\r100 %\n" * 2


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (UserError("no\nroom"), ["error: no", "room"]),
        (KeyboardInterrupt("interrupted: step 3"), ["interrupted: step 3"]),
        (KeyboardInterrupt(), ["interrupted"]),
        (RuntimeError("a defect"), ["RuntimeError: a defect"]),
    ],
)
def test_how_it_ended_is_in_the_log(tmp_path, error, last):
    def work() -> None:
        with logged("launch") as log:
            log.write_to(tmp_path / "log.txt")
            raise error

    with pytest.raises(type(error)):
        work()
    assert lines(tmp_path / "log.txt")[-len(last) :] == last


def test_without_a_folder_nothing_is_written(tmp_path):
    with logged("launch"):
        print("refused")
    assert not list(tmp_path.iterdir())


@contextmanager
def no_room() -> Iterator[None]:
    """No file grows any more; no longer than that, since pytest's own output may be a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def ending(path: Path, error: BaseException) -> None:
    with logged("launch") as log:
        log._file = path.open("a", encoding="utf-8")
        raise error


@pytest.mark.parametrize("error", [UserError("no room"), KeyboardInterrupt("stopped"), KeyError("x")])
def test_a_log_that_is_full_does_not_hide_how_it_ended(tmp_path, error):
    with no_room(), pytest.raises(type(error)) as caught:
        ending(tmp_path / "log.txt", error)
    assert caught.value is error


def test_a_record_that_does_not_fit_is_named(tmp_path):
    with no_room(), pytest.raises(OSError, match="File too large") as caught:
        append(tmp_path / "metrics.jsonl", {"step": 1})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
