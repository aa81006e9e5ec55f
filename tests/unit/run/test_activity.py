"""`activity.json`: what a run is doing, for whoever watches its folder."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rft_cluster.run import activity
from rft_cluster.run.activity import ACTIVITY_FILE, Activity, Now, read_activity
from rft_cluster.run.folder import RunFolder
from tests.unit.run.begun import TASK, config


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(activity, "EVERY", 0.005)


def seen(folder: Path, wanted: Callable[[Now], bool]) -> Now:
    """What is read when `wanted` holds, within 20 seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        now = read_activity(folder)
        if now and wanted(now):
            return now
        time.sleep(0.002)
    raise AssertionError(read_activity(folder))


def test_the_file_says_the_phase_and_what_each_actor_does_and_goes_with_the_run(tmp_path):
    doing = {"generator": "write 8 completions", "learner-0": "idle"}
    own = Activity(tmp_path)
    began = time.time()
    with own.reported(lambda: doing):
        first = seen(tmp_path, lambda _: True)
        assert (first.step, first.phase, first.actors) == (0, "start", doing)
        own.begin(3, "learn")
        doing["learner-0"] = "update"
        second = seen(tmp_path, lambda now: now.actors["learner-0"] == "update" and now.step == 3)
        assert second.phase == "learn"
        assert began <= second.since <= second.now <= time.time()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_file_and_no_thread_is_left_of_a_run_that_ends_in_an_error(tmp_path, error):
    def work() -> None:
        with Activity(tmp_path).reported(dict):
            seen(tmp_path, lambda _: True)
            raise error

    with pytest.raises(error):
        work()
    written = list(tmp_path.iterdir())
    time.sleep(0.03)
    assert written == list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_the_report(tmp_path, monkeypatch):
    writes, write = [], activity.write_text

    def full(path, text):
        writes.append(text)
        if len(writes) < 3:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(activity, "write_text", full)
    with Activity(tmp_path).reported(dict):
        seen(tmp_path, lambda _: True)


def test_the_stages_of_a_step_are_phases(tmp_path):
    run = RunFolder(config(tmp_path), TASK)
    stage = run.stopwatch(7)
    with run.activity.reported(dict):
        with stage("generate"):
            seen(run.path, lambda now: (now.step, now.phase) == (7, "generate"))
        with stage("learn"):
            seen(run.path, lambda now: (now.step, now.phase) == (7, "learn"))
    assert stage.seconds.keys() == {"generate", "learn"}


def test_a_file_that_cannot_be_removed_hides_no_error(tmp_path):
    (tmp_path / ACTIVITY_FILE).mkdir()
    with pytest.raises(KeyboardInterrupt), Activity(tmp_path).reported(dict):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", json.dumps({"step": "many"}), json.dumps({"step": 1, "phase": "learn"})]
)
def test_a_damaged_file_or_a_stranger_s_tells_nothing(tmp_path, content):
    (tmp_path / ACTIVITY_FILE).write_text(content)
    assert read_activity(tmp_path) is None


def test_without_a_file_nothing_is_told(tmp_path):
    assert read_activity(tmp_path) is None
    (tmp_path / ACTIVITY_FILE).mkdir()
    assert read_activity(tmp_path) is None


@pytest.mark.parametrize("value", ["-Infinity", "NaN"])
def test_a_stranger_s_file_has_times_that_can_be_shown(tmp_path, value):
    text = '{"step": 1, "phase": "learn", "since": 5.0, "now": 6.0, "actors": {}}'
    (tmp_path / ACTIVITY_FILE).write_text(text)
    assert read_activity(tmp_path) is not None
    for name in ("5.0", "6.0"):
        (tmp_path / ACTIVITY_FILE).write_text(text.replace(name, value))
        assert read_activity(tmp_path) is None
