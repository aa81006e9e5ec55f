"""Keys that README, the docs and the shipped files name are keys that there are."""

import re
from pathlib import Path

import pytest

from rft_cluster.config import Config

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.yaml"))]
SECTIONS = {name: field.annotation for name, field in Config.model_fields.items() if name != "rewards"}
FILES = ("yaml", "json", "jsonl", "csv", "png", "py", "md", "txt", "log")  # `config.yaml` is no key
ATTRIBUTES = {"prompt.text", "prompt.label", "prompt.image"}  # of the prompt that a reward is given
KEY = re.compile(r"(?<![\w./-])(" + "|".join(SECTIONS) + r")\.([a-z_]+)(?![\w./(])")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_is_named_exists(page: Path):
    named = {found for found in KEY.findall(page.read_text()) if found[1] not in FILES}
    unknown = {f"{section}.{key}" for section, key in named if key not in SECTIONS[section].model_fields}
    assert unknown <= ATTRIBUTES
