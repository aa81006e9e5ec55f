"""Every number has a range, and what is out of it is refused by name before anything is made of it."""

import json
import time
from typing import Any, get_args

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, Section, load_config

BASE: dict[str, dict[str, Any]] = {
    "run": {"name": "mine"},
    "model": {"path": "tiny"},
    "data": {"source": "my_data:load"},
    "evaluation": {"also": {"source": "my_data:load"}},
    "schedule": {"steps": 4, "prompts_per_step": 2},
    "cluster": {"device": "cpu"},
}
SIGNED = ("rewards.accuracy", "data.sixteen_bit", "evaluation.also.sixteen_bit")  # a penalty; a scanner's units
WORDS = {"-1": SIGNED, str(10**12): (), "1e300": (), "nan": (), "inf": (), "-inf": (), "9" * 5000: (), "1e99999": ()}


def has_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(has_number(one) for one in get_args(annotation))


def numbers(section: type[Section] = Config, above: str = "") -> list[tuple[str, str]]:
    """Every key that takes a number, with an override of it in which the number is to be put."""
    found = []
    for name, field in section.model_fields.items():
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
        sections = [one for one in inner if issubclass(one, Section)]
        if sections:
            found += numbers(sections[0], f"{above}{name}.")
        elif has_number(field.annotation):
            key = f"{above}{name}"
            pair = "tuple" in str(field.annotation)
            found.append(("rewards.accuracy", "{}") if key == "rewards" else (key, "[0, {}]" if pair else "{}"))
    return found


NUMBERS = numbers()


def test_the_numbers_are_seen():
    keys = {key for key, _ in NUMBERS}
    assert keys >= {"rewards.accuracy", "optimizer.betas", "model.lora.rank", "schedule.steps", "cluster.step_timeout"}
    assert "model.freeze_vision" not in keys and len(keys) > 40


@pytest.mark.parametrize(("key", "form"), NUMBERS)
def test_a_number_out_of_range_is_refused_at_once(tmp_path, key, form):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(BASE))
    for word, fine in WORDS.items():
        if key in fine:
            continue
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            load_config(str(file), [f"{key}={form.format(word)}"])
        assert time.monotonic() - started < 10
        assert f"  {key}" in str(caught.value) and len(str(caught.value)) < 2000, word


@pytest.mark.parametrize("key", SIGNED)
def test_a_number_that_may_be_negative_is_taken(tmp_path, key):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(BASE))
    load_config(str(file), [f"{key}={'[-1000, 3000]' if key.endswith('sixteen_bit') else -1}"])
