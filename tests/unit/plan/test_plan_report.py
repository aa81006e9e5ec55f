"""The plan's text and command line, and the table of docs/gpus.md."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import plan_table, planned
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.plan import cards
from rft_cluster.plan.__main__ import main
from rft_cluster.plan.cards import CARDS, card_here, card_named, find_card, this_machine
from rft_cluster.plan.report import plan_lines

ROOT = Path(__file__).parents[3]


def text(name: str, card: str, *overrides: str) -> str:
    config = load_config(name, ["data.test=100", *overrides])
    splits = {**plan_table.SPLITS, "test": plan_table.FLOWERS}
    return "\n".join(plan_lines(config, planned.shapes_of("Qwen2-VL-2B"), splits, CARDS[card]))


@pytest.mark.parametrize(
    ("card", "origin"),
    [("l40s", "estimated, never measured"), ("h100", "estimated; gpu_learner.json has figures measured on this card")],
)
def test_each_time_says_where_it_is_from(card, origin):
    said = text("flower102_1gpu", card)
    for line in said.splitlines():
        if re.search(r"\b(min|h) for \d+ steps|^seconds", line):
            assert origin in line
    assert said.count(origin) == 2
    assert "2 x 408 test" in said


def test_parts_add_up_to_the_last_line():
    said = text("flower102_1gpu", "h100").splitlines()
    start = next(index for index, line in enumerate(said) if line.startswith("GiB, "))
    end = next(index for index, line in enumerate(said) if line.startswith("  in all"))
    columns = [[float(value) for value in line.split()[-3:]] for line in said[start + 1 : end]]
    for values, whole in zip(zip(*columns, strict=True), map(float, said[end].split()[-3:]), strict=True):
        assert sum(values) == pytest.approx(whole, abs=0.4)


def test_runs_inside_the_run_have_a_line_each():
    config = load_config("flower102_1gpu", ["data.test=100", "baselines=[sft]", "schedule.warm_start={steps: 20}"])
    splits = {**plan_table.SPLITS, "test": plan_table.FLOWERS}
    said = plan_lines(config, planned.shapes_of("Qwen2-VL-2B"), splits, CARDS["h100"])
    warm, sft = (line for line in said if line.startswith("and SFT"))
    assert warm.endswith("for 20 steps in runs/flower102_1gpu/warm_start")
    assert sft.endswith(f"for {config.schedule.steps} steps in runs/flower102_1gpu/baselines/sft")


def test_what_a_switch_adds_to_the_time_is_said():
    plain = text("flower102_closed", "h100")
    assert "min_live" not in plain and "options" not in plain
    rounds = text("flower102_closed", "h100", "schedule.min_live=0.5")
    (found,) = re.finditer(
        r"the run +(\d+) min to (\d+) min for \d+ steps \(up to (\d+) min to (\d+) min with schedule.min_live\)",
        rounds,
    )
    low, high, most_low, most_high = map(float, found.groups())
    assert 2 < most_low / low < 4 and 2 < most_high / high < 4  # four times the prompts; a few fixed costs
    own = text("flower102_closed", "h100", "prompt.options=own_top_k")
    assert re.search(
        r"evaluations \(2 x 408 test images\), [\d.]+ (s|min) to [\d.]+ (s|min) to ask for options, without", own
    )


def test_a_card_is_measured_if_and_only_if_there_is_a_record():
    records = {file.name: json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("gpu_*.json")}
    cards_of = {
        name: {card_named(gpu["name"], gpu["memory_gib"]) for gpu in found["gpus"]} for name, found in records.items()
    }
    for card in CARDS.values():
        own = {name for name, measured in cards_of.items() if card in measured}
        assert card.record in own if own else card.record == "", f"{card.name}: set its record to one of {own}"


def test_an_unknown_card_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"--gpu H10: did you mean h100\? The table has h200, h100"):
        find_card("H10")
    assert find_card("H100") is CARDS["h100"]


def test_the_drivers_name_finds_the_card(monkeypatch):
    config = load_config("flower102_1gpu", [])
    for name, gib, expected in (
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 23.99, "4090"),
        ("Another", 12, "h100"),
    ):
        monkeypatch.setattr(cards, "smallest_gpu", lambda name=name, gib=gib: (name, int(gib * 2**30)))
        assert card_here(config) is CARDS[expected]


def test_a_cpu_is_measured_as_a_card():
    card = this_machine("float32")
    assert 1 < card.gib < 100_000 and 1e9 < card.flops < 1e14 and 1e8 < card.bandwidth < 1e13
    assert card.name == "this machine"


def test_the_digits_are_planned_without_a_gpu(capsys):
    assert main(["digits", "schedule.steps=17"]) == 0
    said = capsys.readouterr().out
    assert "this machine" in said and "for 17 steps" in said and "fits" in said
    assert re.search(r"^disk +\d+ MB for checkpoints, models and journal$", said, re.MULTILINE)
    assert "GPU" not in said


def test_a_mistake_ends_with_one_line(capsys):
    assert main(["flower102_1gpu", "data.path=/nowhere", "--gpu", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpu nonsense: ")


def test_the_page_has_the_table_of_today():
    page = plan_table.PAGE.read_text()
    assert plan_table.page(page) == page, "run: python -m benchmarks.plan_table"


def test_the_7b_has_its_published_size():
    assert planned.shapes_of("Qwen2-VL-7B").parameters == 8_291_375_616


def test_memory_is_within_15_percent_of_what_was_measured():
    found = {what: plan / real for what, plan, real in plan_table.compared() if what.startswith("GiB")}
    assert len(found) == 13
    assert all(0.85 < ratio < 1.15 for ratio in found.values()), found


def test_seconds_of_an_update_are_within_a_third_of_what_was_measured():
    found = {what: plan / real for what, plan, real in plan_table.compared() if what.startswith("processor")}
    assert len(found) == 2
    assert all(2 / 3 < ratio < 4 / 3 for ratio in found.values()), found
