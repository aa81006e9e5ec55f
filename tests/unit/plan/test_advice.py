"""What is advised if a run does not fit."""

import json
from functools import partial
from pathlib import Path

import pytest

from rft_cluster.config import Config, load_config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.advice import advice_lines, cures
from rft_cluster.plan.cards import CARDS, Card
from rft_cluster.plan.estimate import make_plan
from rft_cluster.plan.report import plan_lines
from rft_cluster.plan.work import Prompts

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHAPES = Shapes.of(json.loads((BENCHMARKS / "qwen2_vl_2b.json").read_text())["config"], Path("config.json"))
FLOWERS = Prompts.of([PromptLength(512, 90)] * 16 + [PromptLength(432, 90)] * 392)
SPLITS = {"train": FLOWERS, "validation": Prompts.of([]), "test": Prompts.of([PromptLength(432, 90)] * 100)}


def planner(card: str | Card):
    found = CARDS[card] if isinstance(card, str) else card
    return partial(make_plan, shapes=SHAPES, prompts=SPLITS, card=found)


def test_the_first_cure_costs_least_time_and_every_cure_fits():
    config, plan_of = load_config("flower102_1gpu", []), planner("l40s")
    assert not plan_of(config).fits
    found = cures(config, plan_of)
    same = [cure for cure in found if not cure.learns_less]
    assert same and found[: len(same)] == sorted(same, key=lambda cure: cure.seconds)
    for cure in found:
        plan = plan_of(load_config("flower102_1gpu", cure.overrides.split()))
        assert plan.fits and plan.slowest == pytest.approx(cure.seconds, abs=0.001)


def test_a_cure_changes_no_more_than_is_needed():
    found = cures(load_config("flower102_1gpu", []), planner("l40s"))
    keys = [frozenset(part.partition("=")[0] for part in cure.overrides.split()) for cure in found]
    assert not any(one < other for index, one in enumerate(keys) for other in keys[index + 1 :])


def test_smaller_rows_are_advised_before_gradient_checkpointing_where_both_fit():
    """A card a little too small: smaller rows cost next to nothing, checkpointing a forward."""
    card = Card("H100, 75 GiB", 75, *(getattr(CARDS["h100"], name) for name in ("flops", "bandwidth", "link")))
    first = cures(load_config("flower102_1gpu", []), planner(card))[0]
    assert first.overrides == "learners.micro_batch_tokens=3072"


def test_an_engine_without_room_for_one_completion_is_told_and_cured():
    config, plan_of = load_config("flower102_1gpu", ["generators.gpu_memory=0.09"]), planner("h100")
    plan = plan_of(config)
    assert not plan.serves and not plan.fits
    lines = "\n".join(plan_lines(config, SHAPES, SPLITS, CARDS["h100"]))
    assert "DOES NOT START" in lines and "generators.gpu_memory=0.11" in lines


def test_nothing_is_advised_that_does_not_help():
    tiny = Card("4 GiB", 4, 1e14, 1e11, 1e10)
    (line,) = advice_lines(load_config("flower102_1gpu", []), planner(tiny))
    assert line.startswith("nothing tried makes it fit") and "larger card" in line


def test_advice_is_given_only_where_it_is_needed():
    config = load_config("flower102_1gpu", [])
    assert not any("to make it fit" in line for line in plan_lines(config, SHAPES, SPLITS, CARDS["h200"]))
    assert any("to make it fit" in line for line in plan_lines(config, SHAPES, SPLITS, CARDS["4090"]))


def on_a_cpu() -> Config:
    return load_config("flower102_1gpu", ["cluster.device=cpu", "generators.gpus=0", "learners.gpus=0"])


def test_a_machine_without_a_gpu_is_one_memory():
    plan = planner(Card("this machine", 24, 1e11, 1e10, 1e10))(on_a_cpu())
    (place,) = plan.places
    assert place.name == "this machine" and not plan.fits
    names = [part.name for part in place.parts]
    assert "weights in shared memory" in names and "engines: KV cache" in names
