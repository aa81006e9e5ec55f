import re

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import json_object, unfinished
from rft_cluster.config import ScheduleSection
from rft_cluster.run.checkpoints import (
    checkpoint_folder,
    clear_unfinished,
    is_due,
    latest_checkpoint,
    prune_checkpoints,
)
from tests.unit.run.begun import checkpoint


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one_that_is_whole(tmp_path):
    """Cut at many places, each of its files, with the sizes on record and, as of older versions, without."""
    checkpoint(tmp_path, 2)
    for state in ({}, {"files": {}, "digests": {}}):
        newest = checkpoint(tmp_path, 4 + len(state), **state)
        assert latest_checkpoint(tmp_path)[0].path == newest
        for file in sorted(newest.iterdir()):
            whole = file.read_bytes()
            for at in range(0, len(whole) - 1, len(whole) // 15):
                file.write_bytes(whole[:at])
                found, (problem,) = latest_checkpoint(tmp_path)
                assert found.path == checkpoint_folder(tmp_path, 2)
                assert problem.startswith(f"{newest}: {file.name} is ")
            file.unlink()
            if state and file.name.endswith(".safetensors"):
                file.write_bytes(whole)  # without sizes on record nobody knows how many ranks there were
                continue
            found, (problem,) = latest_checkpoint(tmp_path)
            assert found.path == checkpoint_folder(tmp_path, 2)
            assert file.name in problem
            file.write_bytes(whole)
        assert latest_checkpoint(tmp_path)[0].path == newest
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()


def test_without_a_whole_checkpoint_the_run_begins_again_only_if_the_journal_has_all_steps(tmp_path):
    only = checkpoint(tmp_path, 4)
    (only / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="has no complete checkpoint; bring one back, or remove"):
        latest_checkpoint(tmp_path)
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "step-000003.jsonl").write_text("{}")  # as after two whole checkpoints
    with pytest.raises(UserError, match="has no complete checkpoint"):
        latest_checkpoint(tmp_path)
    (tmp_path / "journal" / "step-000001.jsonl").write_text("{}")
    found, (problem,) = latest_checkpoint(tmp_path)
    assert found is None and problem == f"{only}: shard-00001.safetensors is missing"


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00002.safetensors", "state.json"])
def test_one_changed_bit_anywhere_is_found_and_the_older_one_taken(tmp_path, name):
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    whole = (newest / name).read_bytes()
    for at in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        (newest / name).write_bytes(changed)
        if name == "state.json" and json_object(bytes(changed)) == json_object(whole):
            continue  # another kind of space
        found, (problem,) = latest_checkpoint(tmp_path)
        assert found.path == checkpoint_folder(tmp_path, 2), at
        assert problem.startswith(f"{newest}: {name} is ") and "damaged" in problem
    (newest / name).write_bytes(whole)
    assert latest_checkpoint(tmp_path)[0].path == newest


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00003.safetensors"])
def test_a_link_to_nothing_is_no_shard(tmp_path, name):
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    (newest / name).unlink(missing_ok=True)
    (newest / name).symlink_to(tmp_path / "gone")
    found, problems = latest_checkpoint(tmp_path)
    if name == "shard-00003.safetensors":  # of no rank
        assert (found.path, problems) == (newest, [])
    else:
        assert found.path == checkpoint_folder(tmp_path, 2)
        assert problems == [f"{newest}: {name} is missing"]


def test_a_changed_bit_in_the_number_of_the_format_is_not_a_newer_version(tmp_path):
    checkpoint(tmp_path, 2)
    state = checkpoint(tmp_path, 4) / "state.json"
    changed = state.read_text().replace('"format": 2', '"format": 3')
    assert changed != state.read_text()
    state.write_text(changed)
    found, (problem,) = latest_checkpoint(tmp_path)
    assert found.path == checkpoint_folder(tmp_path, 2) and "state.json is damaged" in problem


def test_a_digest_of_a_file_elsewhere_is_not_read(tmp_path):
    checkpoint(tmp_path, 4, digests={"../../secret": "0" * 64})
    with pytest.raises(UserError, match=re.escape("../../secret is missing")):
        latest_checkpoint(tmp_path)


def test_without_a_whole_one_the_cure_is_to_remove_them(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / "state.json").write_text("")
    with pytest.raises(
        UserError, match=re.escape(f"remove {tmp_path / 'checkpoints'} to begin the run again")
    ) as error:
        latest_checkpoint(tmp_path)
    assert "state.json is damaged" in str(error.value)
    folder.rename(tmp_path / "aside")
    (tmp_path / "checkpoints").rmdir()
    assert latest_checkpoint(tmp_path) == (None, [])


def test_the_newest_are_kept(tmp_path):
    for step in (9, 100, 40):
        checkpoint(tmp_path, step)
    assert prune_checkpoints(tmp_path, 100, 2) == 40
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000040", "step-000100"]


@pytest.mark.parametrize(("keep", "left"), [(1, [75]), (2, [50, 75]), (3, [25, 50, 75])])
def test_a_damaged_one_does_not_displace_those_that_are_whole(tmp_path, keep, left):
    """The run went on from step 50, as the one of step 100 was damaged, and has saved step 75."""
    for step in (25, 50, 75, 100):
        checkpoint(tmp_path, step)
    assert prune_checkpoints(tmp_path, 75, keep) == left[0]
    assert sorted((tmp_path / "checkpoints").iterdir()) == [checkpoint_folder(tmp_path, step) for step in left]


@pytest.mark.parametrize("before", [False, True], ids=["new", "in place of an older one"])
@pytest.mark.parametrize("died", ["writing", "renaming"])
def test_what_a_crash_while_saving_left_is_cleared(tmp_path, before, died):
    final = tmp_path / "model-best"
    if before:
        final.mkdir()
        (final / "old").touch()
    (tmp_path / "model-best.tmp").mkdir()
    if died == "renaming" and before:
        final.rename(tmp_path / "model-best.old")
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == (["model-best"] if before else [])
    assert not before or [path.name for path in final.iterdir()] == ["old"]


def test_what_fails_leaves_nothing_and_the_older_one(tmp_path):
    final = tmp_path / "model"
    with unfinished(final) as folder:
        (folder / "first").touch()

    def fill() -> None:
        with unfinished(final) as folder:
            (folder / "second").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in final.iterdir()] == ["first"]


def schedule(**values: float) -> ScheduleSection:
    return ScheduleSection(steps=100, prompts_per_step=1, **values)


@pytest.mark.parametrize("settings", [{}, {"save_every": 7}, {"save_minutes": 1}])
def test_the_last_step_is_always_saved(settings):
    assert is_due(schedule(**settings), 100, seconds=0, cost=1000)


def test_by_steps():
    assert [step for step in range(1, 31) if is_due(schedule(save_every=7), step, 599, 0)] == [7, 14, 21, 28]


def test_by_steps_and_by_the_clock():
    """A machine may be taken back long before the next multiple of `save_every`."""
    both = schedule(save_every=50, save_minutes=5)
    assert not is_due(both, 49, 299, 0) and is_due(both, 49, 301, 0) and is_due(both, 50, 1, 0)
    assert not is_due(both, 49, 301, cost=12)  # 2 % of the time


@pytest.mark.parametrize("minutes", [0.5, 10.0, 60.0])
@pytest.mark.parametrize("cost", [0.0, 0.3, 11.9, 12.1, 60.0, 600.0])
@pytest.mark.parametrize("step_seconds", [0.4, 60.0, 1000.0])
def test_by_the_clock_as_often_as_asked_and_two_percent_of_the_time_at_most(minutes, cost, step_seconds):
    clock, saved_at, saved = 0.0, 0.0, 0
    for step in range(1, 100):
        clock += step_seconds
        if is_due(schedule(save_minutes=minutes), step, clock - saved_at, cost if saved else 0.0):
            gap = clock - saved_at
            assert gap >= 60 * minutes
            assert gap - step_seconds < max(60 * minutes, 50 * cost)
            clock += cost
            saved_at, saved = clock, saved + 1
    first = cost  # before the first nobody knows what saving costs
    assert saved * cost - first <= 0.02 * clock
