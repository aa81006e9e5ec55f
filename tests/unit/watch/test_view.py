"""What the terminal shows of a run, at any size, whatever is in its folder."""

import json
import shutil
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from rft_cluster.report.hints import Hint
from rft_cluster.run.activity import Now
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.history import read_history
from rft_cluster.run.lock import locked
from rft_cluster.watch.__main__ import _view
from rft_cluster.watch.view import MOST_ACTORS, View
from tests.unit.run.begun import TASK, config
from tests.unit.run.steps import ADVANTAGES, GROUPS, LEARNER, REWARDS, stats
from tests.unit.test_train import finished

NOW = Now(step=2, phase="learn", since=1000.0, now=1004.5,
          actors={"generator": "idle", "reward": "idle", "learner-0": "update", "learner-1": "update"})  # fmt: skip
HOSTILE = "\x1b]0;title\x07\x1b[31m[bold red]x[/bold red][link=file:///etc/passwd]\u202e\r\n"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("done"))


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "mine"))


def said(text: str) -> Hint:
    return Hint("warning", text, f"Cure: {text}", "above 40 %")


def begun(folder: Path) -> Path:
    """A run of 80 steps after the second."""
    own = RunFolder(config(folder), TASK)
    for step in (1, 2):
        own.log_rollouts(step, GROUPS, REWARDS, ADVANTAGES, LEARNER)
        own.log_step(stats(step))
    return own.path


def shown(view: View, width: int = 120, height: int = 40) -> list[str]:
    console = Console(width=width, height=height, color_system=None)
    with console.capture() as captured:
        console.print(view, height=height)
    return captured.get().splitlines()


def test_a_run_in_progress(tmp_path):
    folder = begun(tmp_path)
    (folder / "log.txt").write_text(
        "2026-01-02 03:04:05  generator is ready\n2026-01-02 03:04:06  step 2/80  reward\n"
        "2026-01-02 03:04:06    <think>of debug mode\n"
    )
    with locked(folder):
        lines = shown(View(read_history(folder), NOW, time=1005.0))
    text = "\n".join(lines)
    assert "mine" in lines[0]
    # The step began its update 5 s ago; 78 steps of 4 s are left.
    assert "in progress  ·  2 of 80 steps  ·  step 2: learn for 0:05  ·  5:12 left" in lines[1]
    assert "log: generator is ready" in lines[2]
    assert "reward 0.75" in text and "log-prob gap 0.05" in text and "accuracy: none yet" in text
    assert "generate 2.00 s   50 %" in text and "learn    1.50 s   38 %" in text
    assert "learner-0  update" in text and "reward     idle" in text
    assert "answers of step 2" in text and "digits/0  label 'seven'" in text
    assert "1.00 -0.70 no answer block, label 'seven'; format ok  <think>ä</think>" in text


def test_a_run_that_is_done_shows_its_result_and_no_actors(done):
    view = View(read_history(done), None, time=0.0)
    text = "\n".join(shown(view))
    assert not view.goes_on
    assert "done  ·  6 of 6 steps" in text and "no actors" in text and "left" not in text and "log:" not in text
    assert "validation accuracy 0.5" in text


@pytest.mark.parametrize("width", [1, 12, 30, 60, 80, 132, 300])
@pytest.mark.parametrize("height", [1, 4, 10, 24, 50, 120])
def test_it_fits_into_any_terminal(done, width, height):
    lines = shown(View(read_history(done), NOW, time=1005.0, hints=[said("look at format")]), width, height)
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)
    assert width < 20 or height < 4 or "in progress" in lines[1]


@pytest.mark.parametrize("height", [24, 40, 60])
def test_a_usual_terminal_has_room_for_curves_actors_answers_and_hints(done, height):
    text = "\n".join(shown(View(read_history(done), NOW, 1005.0, [said("41 % of groups teach nothing")]), 80, height))
    assert "reward 0.5" in text and "learner-1  update" in text
    assert "answers of step 6" in text or "41 %" in text


def test_the_words_of_a_stranger_s_run_control_no_terminal_and_are_no_markup(copy):
    rows = [
        {"prompt_id": HOSTILE, "example_id": HOSTILE, "label": HOSTILE, "completions": [HOSTILE] * 2, "why": [HOSTILE],
         "rewards": [{"total": 1.0, "parts": {}, "failures": {}}, {"total": None, "parts": {}, "failures": {}}]}
    ]  # fmt: skip
    file = copy / "rollouts" / "step-000006.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (copy / "log.txt").write_text(f"2026-01-02 03:04:05  {HOSTILE}")
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 7, f"seconds/{HOSTILE}": 1.0, "reward": HOSTILE}) + "\n")
    named = copy.rename(copy.with_name("\x1b[2J[red]run"))
    now = NOW.model_copy(update={"phase": HOSTILE, "actors": {HOSTILE: HOSTILE}})
    with locked(named):
        lines = shown(View(read_history(named), now, 1005.0, [said(HOSTILE)]))
    assert all(character.isprintable() for line in lines for character in line), lines
    text = "\n".join(lines)
    assert text.count("[bold red]x[/bold red]") >= 6, "shown as it is: no markup"
    assert "[red]run" in lines[0]
    assert "masked" in text


@pytest.mark.parametrize(
    ("row", "is_shown"),
    [
        ({"prompt_id": "train/5/0", "example_id": "a", "label": "rose", "completions": ["one", "two"]}, True),
        ({"completions": ["one"]}, False),
        ({"example_id": 1, "label": None, "completions": "one"}, False),
        ({"example_id": "a", "label": "rose", "completions": [], "rewards": [{"total": "x"}]}, False),
        ({"example_id": "a", "label": "rose", "completions": ["one"], "rewards": [{"total": 1.0, "parts": []}]}, True),
        ({"example_id": "a", "label": "rose", "completions": ["one"], "rewards": "many"}, False),
    ],
)
def test_a_row_of_an_older_version_or_none_that_a_run_writes_ends_nothing(copy, row, is_shown):
    (copy / "rollouts" / "step-000006.jsonl").write_text(json.dumps(row) + "\n")
    dead = "".join(f'{{"step": {step}, "live_groups": 0.0}}\n' for step in range(2, 7))
    (copy / "metrics.jsonl").write_text('{"step": 1, "reward": NaN, "seconds/learn": "long"}\n' + dead)
    (copy / "config.yaml").write_text("format: 999\n")
    lines = shown(_view(copy))
    assert "100 % of groups teach nothing" in "\n".join(lines)
    assert ("answers of step 6" in "\n".join(lines)) is is_shown


def test_a_large_cluster_is_cut_with_a_word(done):
    actors = {f"generator-{index}": "write 16 completions" for index in range(64)}
    text = "\n".join(shown(View(read_history(done), NOW.model_copy(update={"actors": actors}), 1005.0)))
    assert text.count("write 16 completions") == MOST_ACTORS
    assert f"and {64 - MOST_ACTORS} more" in text


@pytest.mark.parametrize(
    ("is_locked", "silent", "goes_on", "warned"),
    [
        (True, 1.0, True, False),
        (True, 45.0, True, True),  # frozen, or killed on a machine whose lock is still there
        (False, 1.0, True, False),  # a file system that does not pass on locks: the driver's word counts
        (False, 45.0, False, False),  # it was killed
    ],
)
def test_whether_it_goes_on_is_told_by_the_lock_and_by_the_driver_s_word(tmp_path, is_locked, silent, goes_on, warned):
    folder = begun(tmp_path)
    if is_locked:
        with locked(folder):
            view = View(read_history(folder), NOW, NOW.now + silent)
    else:
        view = View(read_history(folder), NOW, NOW.now + silent)
    assert view.goes_on is goes_on
    assert ("no word from the driver for 0:45" in "\n".join(shown(view))) is warned
