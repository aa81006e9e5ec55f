import pytest

from rft_cluster.common import progress
from rft_cluster.common.progress import with_progress


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 7.0])
def test_lines_come_only_when_it_takes_long(monkeypatch, capsys, seconds):
    now = [100.0]
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": lambda: now[0]}))
    for item in with_progress(range(10), "reading images"):
        now[0] += seconds
        assert item in range(10)
    lines = capsys.readouterr().out.splitlines()
    # Ten items take 10 * seconds; a line at most every three, and none for the first or after the last.
    assert len(lines) == {0.0: 0, 0.5: 1, 1.0: 3, 7.0: 9}[seconds]
    if seconds == 7.0:
        assert lines[0] == "reading images: 1 of 10, 1:03 left" and lines[-1] == "reading images: 9 of 10, 0:07 left"
