"""Files that are there whole or not at all, and folders that cannot take them."""

import errno
import itertools
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import (
    DiskFull,
    bytes_in,
    check_space,
    check_writable,
    size,
    unfinished,
    walk,
    write_json,
    write_text,
)

LIMIT = 1000


@contextmanager
def small_files() -> Iterator[None]:
    """No file grows past `LIMIT` bytes: the system's own refusal, as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_json_is_written_for_people_too(tmp_path):
    write_json(tmp_path / "state.json", {"step": 3})
    assert (tmp_path / "state.json").read_text() == '{\n  "step": 3\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("write", [write_text, write_json])
def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_other(tmp_path, before, write):
    file = tmp_path / "a.json"
    if before:
        file.write_text(before)
    with small_files(), pytest.raises(OSError, match="File too large") as caught:
        write(file, "x" * 10 * LIMIT)
    assert caught.value.filename == str(file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([before] if before else [])


def test_a_signal_while_a_file_is_written_leaves_the_old_one_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text(file, "old")

    def interrupted(path, content):
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def fill(final: Path, data: bytes, error: BaseException) -> None:
    with unfinished(final) as folder:
        (folder / "shard").write_bytes(data)
        raise error


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_folder_that_does_not_fit_is_removed_and_the_room_is_told(tmp_path, before, number):
    final = tmp_path / "step-000001"
    if before:
        final.mkdir()
        (final / "state.json").write_text(before)
    with pytest.raises(UserError) as caught:
        fill(final, b"x" * 3 * 10**6, OSError(number, os.strerror(number)))
    message = str(caught.value)
    assert message.startswith(f"{final} cannot be written: {os.strerror(number)}. It needs more than 3 MB; ")
    assert re.search(r"[\d.]+ [MG]B are free", message)
    assert [path.name for path in tmp_path.iterdir()] == ([final.name] if before else [])
    assert not before or (final / "state.json").read_text() == before


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), OSError(errno.EIO, "fault"), KeyboardInterrupt(), SystemExit(1)]
)
def test_any_other_error_comes_as_it_is_and_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        fill(tmp_path / "model", b"x", error)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parents", ["", "checkpoints"])
def test_a_disk_that_is_full_to_the_last_block_cannot_take_even_the_folder(tmp_path, monkeypatch, parents):
    def full(folder: Path, **_: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="step-000001 cannot be written: No space left on device"):
        fill(tmp_path / parents / "step-000001", b"", AssertionError("nothing is to be written"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_others_remove_meanwhile_does_not_hide_the_error(tmp_path, monkeypatch):
    """Other ranks may still write to the folder when the first fails."""
    monkeypatch.setattr(os, "walk", lambda folder: [(str(folder), [], ["removed.safetensors"])])
    with pytest.raises(DiskFull):
        fill(tmp_path / "step-000001", b"", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    for text in ("one", "two"):
        with unfinished(tmp_path / "model") as folder:
            (folder / "a").write_text(text)
            assert folder.name != "model"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "two"


# --- looking before writing

BELOW = ["", "a", "a/b/c"]


@pytest.mark.parametrize("below", BELOW)
@pytest.mark.parametrize("place", ["/proc/sys", "/sys/kernel"])
def test_a_place_where_nothing_can_be_made(place, below):
    with pytest.raises(UserError, match=f"^{Path(place, below)} cannot be written.*. Do this$"):
        check_writable(Path(place, below), "Do this")


@pytest.mark.parametrize(("below", "make"), itertools.product(BELOW, ["file", "fifo", "link to nothing", "loop"]))
def test_something_that_is_no_folder_is_in_the_way(tmp_path, below, make):
    path = tmp_path / "runs"
    match make:
        case "file":
            path.write_text("")
        case "fifo":
            os.mkfifo(path)
        case "link to nothing":
            path.symlink_to(tmp_path / "gone")
        case "loop":
            path.symlink_to(path)
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(path / below, "")


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "薔" * 86])
@pytest.mark.parametrize("below", BELOW)
def test_a_name_that_is_too_long(tmp_path, name, below):
    with pytest.raises(UserError, match="File name too long"):
        check_writable(tmp_path / name / below, "")


@pytest.mark.parametrize("below", [*BELOW, "x" * 255, "薔薇/🌹 #1/[2024]"])
def test_looking_leaves_nothing(tmp_path, below):
    check_writable(tmp_path / below, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", BELOW)
def test_room_is_measured_where_the_folder_will_be(tmp_path, below, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / below, free // 2, "checkpoints", "Free some")
    with pytest.raises(
        UserError, match=f"^checkpoints need .* in {tmp_path / below}, but .* are free there. Free some$"
    ):
        check_space(tmp_path / below, free * 2, "checkpoints", "Free some")


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rose.jpg").touch()
    found = {folder.name: names for folder, _, names in walk(tmp_path) if names}
    assert found == {"open": ["rose.jpg"], "closed": ["rose.jpg"]}
    scan = os.scandir

    def refuse(path):  # as for another user than root, whom permissions do not stop
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        list(walk(tmp_path))


def test_sizes_are_for_people(tmp_path):
    assert [size(n) for n in (0, 28 * 10**6, 4_400_000_000)] == ["0 MB", "28 MB", "4.4 GB"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"x" * 10)
    (tmp_path / "a" / "link").symlink_to("/")
    assert 10 <= bytes_in(tmp_path / "a") < 20
    assert bytes_in(tmp_path / "none") == 0
