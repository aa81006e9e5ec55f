"""Which runs of `benchmarks.switches` are due, and its tables, from made-up records."""

import json

import pytest

from benchmarks import switches
from benchmarks.switches import DEFAULT, Key, baselines_table, due, helped, rows_of, switches_table
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.model.tiny.conditions import RECIPE_VERSION
from rft_cluster.prompts import asks_for_thinking, render_template
from rft_cluster.sweep import combinations

ROWS = [DEFAULT, "closed", "gpg"]


def record(row: str, seed: int, right: int, data: str = "digits", **more: object) -> dict:
    """A run that answered `right` of 100 images."""
    key = Key(data, row, seed)
    found = {"n": 100, "before": 0.1, "after": right / 100, "format": 1.0, "images": f"of {seed}"}
    baselines = {"nearest_neighbour": 0.8, "rbf_svm": 0.82}
    flags = "1" * right + "0" * (100 - right)
    settings = {"settings": key.settings, "tiny": RECIPE_VERSION, "baselines": baselines, "right": flags}
    return {"data": data, "row": row, "seed": seed, **found, **settings, **more}


DEFAULTS = [record(DEFAULT, seed, 85) for seed in switches.SEEDS]


@pytest.mark.parametrize("data", switches.DATA)
@pytest.mark.parametrize("row", switches.ROWS)
def test_each_row_is_a_configuration(data, row):
    plan = Key(data, row, 41).sweep
    (run,) = combinations(plan)
    assert load_config(plan.config, run.overrides(plan)).run.seed == 41
    assert "," not in row, "--rows is separated by commas"


def test_the_default_comes_first_then_two_seeds_of_each_row():
    keys = due([], ["digits", "clothes"], ROWS)
    first = [("digits", DEFAULT, seed) for seed in (41, 42, 43, 44, 45)]
    first += [("digits", row, seed) for row in ("closed", "gpg") for seed in (41, 42)]
    assert [(key.data, key.row, key.seed) for key in keys[:9]] == first
    assert [key.data for key in keys[9:]] == ["clothes"] * 9
    assert due([record("gpg", 42, 80)], ["digits"], ["gpg"]) == [Key("digits", "gpg", 41)]


@pytest.mark.parametrize(
    ("rights", "more"),
    [
        ((86, 86), [43, 44, 45]),  # by a point with both
        ((87, 85), []),  # by a point in the median, but not with both
        ((84, 99), []),
        ((90,), []),  # the other seed is due
    ],
)
def test_what_helped_with_both_first_seeds_has_five(rights, more):
    records = [*DEFAULTS, *(record("closed", seed, right) for seed, right in zip((41, 42), rights, strict=False))]
    assert helped(records, "digits", "closed") == bool(more)
    rest = [key.seed for key in due(records, ["digits"], ROWS) if key.row == "closed"]
    assert rest == (more if len(rights) == 2 else [42])
    assert not helped(records, "clothes", "closed")


def test_help_is_judged_by_the_first_seeds_alone():
    worse = [record("closed", seed, 50) for seed in (43, 44)]
    records = [*DEFAULTS, record("closed", 41, 88), record("closed", 42, 88), *worse]
    assert [key.seed for key in due(records, ["digits"], ["closed"])] == [45]


@pytest.mark.parametrize("changed", [{"settings": ["algorithm.advantage=other"]}, {"tiny": RECIPE_VERSION - 1}])
def test_a_run_with_other_settings_or_another_small_model_is_due_again_and_one_that_failed_is_not(changed):
    former = record("gpg", 41, 80) | changed
    failed = {**record("gpg", 42, 80), "failed": "error: no room"}
    assert due([former, failed], ["digits"], ["gpg"]) == [Key("digits", "gpg", 41)]
    (row,) = rows_of([former, failed], "digits", ["gpg"])
    assert (row.repeats, row.missing) == ((), (41, 42))


def test_runs_that_failed_are_made_again_where_asked_and_the_others_stay(monkeypatch):
    failed = [{**record(row, 42, 0), "failed": "error: no room"} for row in ("gpg", "rloo")]
    kept = {}
    monkeypatch.setattr(switches, "runs_in", lambda dtype: [record("gpg", 41, 80), *failed])
    monkeypatch.setattr(switches, "measured", lambda key: record(key.row, key.seed, 81))
    monkeypatch.setattr(switches, "write_result", lambda name, result: kept.update(result))
    monkeypatch.setattr(switches, "write_page", lambda found: None)
    assert switches.work(5, ["digits"], ["gpg"], again=False) == 0 and not kept
    assert switches.work(5, ["digits"], ["gpg"], again=True) == 0
    assert [(one["row"], one["seed"], one.get("failed")) for one in kept["runs"]] == [
        ("gpg", 41, None), ("rloo", 42, "error: no room"), ("gpg", 42, None)
    ]  # fmt: skip


def test_the_records_are_read_as_they_were_written():
    (row,) = rows_of(json.loads(json.dumps(DEFAULTS)), "digits", [DEFAULT])
    assert [one.seed for one in row.repeats] == list(switches.SEEDS) and row.missing == ()
    assert sum(row.repeats[0].right) == 85 and row.repeats[0].after == 0.85


def test_the_tables():
    failed = {**record("rloo", 42, 0), "failed": "error: no room"}
    records = [*DEFAULTS, record("closed", 41, 88), record("closed", 42, 84), failed]
    lines = switches_table(records, "digits").splitlines()
    assert lines[0].startswith("| switch | before | after | range over seeds | seeds | less default, by seed | p |")
    assert lines[2].startswith("| default | 10.0 % | **85.0 %** | 85.0 to 85.0 | 41, 42, 43, 44, 45 | - | - | - |")
    (closed,) = [line for line in lines if line.startswith("| closed |")]
    assert "| **86.0 %** | 84.0 to 88.0 | 41, 42 | +1.0 (-1.0 to +3.0) | 1 | +1.0 (" in closed
    assert lines[-5:-3] == ["- rloo, seed 42, failed: error: no room", ""]
    assert lines[-3] == "Better with both of the first seeds, by a point in the median: none, of 1 rows that have both."
    assert lines[-1].startswith("Not measured: answer only, labels listed, closed with own answers, dr_grpo,")
    assert switches_table(records, "clothes") == "Not measured."
    table = baselines_table(rows_of(DEFAULTS, "digits", [DEFAULT])[0].repeats).splitlines()
    seeds = " | ".join(f"seed {seed}" for seed in switches.SEEDS)
    assert table[0] == f"| test accuracy, % | {seeds} | median | policy less it, points | p |"
    assert table[2] == f"| **the policy** | {' | '.join(['85.0'] * 5)} | **85.0** |  |  |"
    assert table[3] == f"| the policy before | {' | '.join(['10.0'] * 5)} | **10.0** | +75.0 (+75.0 to +75.0) | 0.062 |"
    assert table[-1].startswith("| SVM with an RBF kernel on pixels | 82.0 |")
    assert table[-1].endswith("| **82.0** | +3.0 (+3.0 to +3.0) | 0.062 |")


def test_a_row_that_helped_is_named():
    records = [*DEFAULTS, *(record("closed", seed, 88) for seed in (41, 42)), record("gpg", 41, 99)]
    assert "in the median: closed, of 1 rows that have both." in switches_table(records, "digits")


def test_the_table_beside_published_figures_names_each_setting():
    closed = [record("closed", seed, right) for seed, right in zip(switches.SEEDS, (88, 84, 86, 86, 85), strict=True)]
    of_default = "| digits | open | yes | equal | 4 | 100 | 85.0 (85.0 to 85.0) | 5 |"
    assert switches.ours_table([*DEFAULTS, *closed]).splitlines()[2:] == [
        of_default,
        "| digits | listed | no | equal | 4 | 100 | 86.0 (84.0 to 88.0) | 5 |",
    ]
    assert switches.ours_table([*DEFAULTS, *closed[:4]]).splitlines()[2:] == [of_default], "a table has five seeds"
    assert switches.ours_table([]) == "Not measured."
    for name in switches.TEMPLATES:
        plan = Key("digits", name, 41).sweep
        (run,) = combinations(plan)
        text = render_template(load_config(plan.config, run.overrides(plan)).prompt.template, "flower", ["rose"])
        asked = ("listed" if "rose" in text else "open", "yes" if asks_for_thinking(text) else "no")
        assert switches.TEMPLATES[name] == asked


def test_the_pages_have_a_place_for_each_table(tmp_path, monkeypatch):
    for name in ("PAGE", "PUBLISHED", "BASELINES"):
        page = getattr(switches, name)
        (tmp_path / page.name).write_text(page.read_text())
        monkeypatch.setattr(switches, name, tmp_path / page.name)
    before = (tmp_path / "baselines.md").read_text()
    switches.write_page({"float32": [], "bfloat16": DEFAULTS[:4]})
    assert (tmp_path / "baselines.md").read_text() == before, "a table has five seeds"
    switches.write_page({"float32": [], "bfloat16": DEFAULTS})
    assert (tmp_path / "switches.md").read_text().count("Not measured.") == 3  # the clothes, and both in FP32
    filled = (tmp_path / "baselines.md").read_text()
    assert filled.count(f"| **the policy** | {' | '.join(['85.0'] * 5)} |") == 1  # the page's own are of other runs
    assert "| digits | open | yes |" in (tmp_path / "published.md").read_text()
    assert "(switches.png)" in (tmp_path / "switches.md").read_text() and (tmp_path / "switches.png").exists()
    switches.write_page({"float32": [], "bfloat16": []})
    assert (tmp_path / "switches.md").read_text().count("Not measured.") == 5
    assert (tmp_path / "baselines.md").read_text() == filled


def test_rows_with_all_seeds_stand_beside_a_baseline_of_the_same_images():
    """By hand: 80.0 % of the baseline from 85 and from 86, 87, 82, 90, 79."""
    rights = (86, 87, 82, 90, 79)
    closed = [record("closed", seed, right) for seed, right in zip(switches.SEEDS, rights, strict=True)]
    lines = switches.tried_table(
        [*DEFAULTS, *closed, record("gpg", 41, 99)], "digits", "nearest_neighbour"
    ).splitlines()
    assert lines[0].split(" | ")[-3] == "less 1-nearest neighbour on pixels, points"
    assert lines[2:] == [
        "| closed | +6.0 | +7.0 | +2.0 | +10.0 | -1.0 | +6.0 (-1.0 to +10.0) | 0.12 | 86.0 |",
        "| default | +5.0 | +5.0 | +5.0 | +5.0 | +5.0 | +5.0 (+5.0 to +5.0) | 0.062 | 85.0 |",
    ]


@pytest.mark.parametrize(("data", "rows"), [(["digit"], ROWS), (["digits"], ["clsoed"])])
def test_an_unknown_name_is_refused(data, rows):
    with pytest.raises(UserError, match=r"Did you mean (digits|closed)\?"):
        switches.work(1, data, rows, again=False)


def test_runs_are_done_one_by_one_and_kept(tmp_path, monkeypatch):
    """A run is stood in for: what is tested is what becomes of its record."""
    kept: dict[str, list[dict]] = {"runs": [record("gpg", 41, 1) | {"settings": []}, *DEFAULTS]}
    done = []

    def measured(key: Key) -> dict:
        done.append((key.row, key.seed))
        return record(key.row, key.seed, 80, **({"failed": "no room"} if key.seed == 42 else {}))

    monkeypatch.setattr(switches, "FOLDER", tmp_path)
    monkeypatch.setattr(switches, "read_result", lambda name: json.loads(json.dumps(kept)))
    monkeypatch.setattr(switches, "write_result", lambda name, result: kept.update(result))
    monkeypatch.setattr(switches, "write_page", lambda records: None)
    monkeypatch.setattr(switches, "measured", measured)
    assert switches.work(1, ["digits"], ROWS, again=False) == 0
    assert switches.work(9, ["digits"], ROWS, again=False) == 1
    assert done == [("closed", 41), ("closed", 42), ("gpg", 41), ("gpg", 42)]
    assert switches.work(9, ["digits"], ROWS, again=False) == 0 and len(done) == 4
    assert switches.work(9, ["digits"], ROWS, again=True) == 1
    assert done[4:] == [("closed", 42), ("gpg", 42)] and len(kept["runs"]) == 9
