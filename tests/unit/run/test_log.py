import re
import sys

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.run.log import logged

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
