"""docs/configuration.md is what the sections say, whole and up to date."""

from pathlib import Path

from rft_cluster.config import Config
from rft_cluster.config.reference import page

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def keys(model, prefix: str) -> set[str]:
    return {f"{prefix}.{key}" for key in model.model_fields}


def test_it_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m rft_cluster.config.reference > docs/configuration.md"


def test_every_key_has_a_row():
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if name not in ("rewards", "tracking", "baselines")
    }
    wanted = set().union(*(keys(model, name) for name, model in sections.items()))
    found = {line.split("`")[1] for line in page().splitlines() if line.startswith("| `")}
    assert wanted <= found
    nested = ("model.lora.", "data.augment.", "evaluation.also.", "schedule.warm_start.")
    assert {name for name in found - wanted if not name.startswith(nested)} == set()
