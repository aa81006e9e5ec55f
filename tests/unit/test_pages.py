"""The links between the README, the pages of docs/ and the files that they name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").glob("**/*.md"))]
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?(?:\s+"[^"]*")?\)')


def links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of each; either may be empty."""
    return LINK.findall(CODE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for name, anchor in links(page):
        target = page.parent / name if name else page
        assert target.exists(), f"{name} is not there"
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading #{anchor}"


def test_each_page_is_linked_from_the_readme_or_from_a_page_that_is():
    found, new = set(), {ROOT / "README.md"}
    while new:
        found |= new
        named = {(page.parent / name).resolve() for page in new for name, _ in links(page) if name}
        new = {page for page in named if page.suffix == ".md"} - found
    assert set(PAGES) <= found
