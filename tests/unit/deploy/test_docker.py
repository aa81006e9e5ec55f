"""The Dockerfile and .dockerignore fit together: an image gets what it needs and nothing else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def copied() -> set[str]:
    """Paths in this folder that the image copies."""
    lines = re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_only_what_is_copied_reaches_the_build(copied: set[str]):
    """The first line leaves everything out, so a file of the user's has to be named to travel."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_through = {Path(line.removeprefix("!")).parts[0] for line in lines if line.startswith("!")}
    assert {Path(source).parts[0] for source in copied} == let_through
    assert all((ROOT / source).exists() for source in copied)


def test_packages_are_installed_before_the_code_is_copied(copied: set[str]):
    """Else each change of the code would install them again; and all that deploy/install.sh calls must be there."""
    before, _, after = DOCKERFILE.partition("AS final")
    assert "COPY rft_cluster rft_cluster" in after and "COPY rft_cluster" not in before
    called = re.findall(r"deploy/\w+\.py", (ROOT / "deploy" / "install.sh").read_text())
    assert {"deploy/install.sh", "deploy/locks", *called} <= copied
    assert "USER 1000:1000" in after


@pytest.mark.parametrize("script", ["docker/make_image.sh", "bare_test.sh"])
def test_packages_are_installed_from_lists_that_are_there(script: str):
    """A bare machine has none, and apt-get finds no package then."""
    commands = re.findall(r"^ *apt-get (update|install)", (ROOT / "deploy" / script).read_text(), re.MULTILINE)
    assert commands == ["update", "install"]


def test_the_image_is_tried_in_a_shell_that_ends_with_its_first_failure():
    """Without `ip`, for one, which not every Debian has."""
    text = (ROOT / "deploy" / "docker" / "make_image.sh").read_text()
    assert "command -v ip" in text and " iproute2" in text
    assert re.search(r"bash -c '(.*)\n *ip link", text)[1] == "set -e"
