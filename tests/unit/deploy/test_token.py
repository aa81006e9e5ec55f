"""The token of Ray, which lets its reader run code: its file is the user's alone from its first moment."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private.authentication.authentication_token_setup import generate_and_save_token

from rft_cluster.cluster import start
from rft_cluster.config import ClusterSection

ROOT = Path(__file__).parents[3]
COMMAND = "(umask 077; ray get-auth-token --generate)"


@pytest.fixture
def token(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """Where it is written; other users may read new files."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    before = os.umask(0o022)
    yield tmp_path / ".ray" / "auth_token"
    os.umask(before)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def connected(monkeypatch, token: Path) -> int | None:
    """The mode of the file when Ray has just written it by its own code; None if there is none."""
    modes = []

    def init(**options: object) -> SimpleNamespace:
        if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}:
            generate_and_save_token()
        modes.append(mode(token) if token.exists() else None)
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr(start.ray, "init", init)
    start.connect(ClusterSection(device="cpu"), 1)
    return modes[0]


def test_a_token_that_a_launch_makes_was_never_for_others(token: Path, monkeypatch):
    assert connected(monkeypatch, token) == 0o600
    assert len(token.read_text()) == 64
    token.chmod(0o644)  # as Ray alone makes it
    assert connected(monkeypatch, token) == 0o600


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "mine")])
def test_no_file_is_made_where_ray_needs_none(token: Path, monkeypatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    assert connected(monkeypatch, token) is None


def test_an_empty_file_counts_as_none_for_ray(token: Path):
    """So it makes its token, into that file. In a process of its own: Ray's core remembers a token."""
    token.parent.mkdir()
    token.touch(mode=0o600)
    subprocess.run(["ray", "get-auth-token", "--generate"], check=True, capture_output=True)
    assert (len(token.read_text()), mode(token)) == (64, 0o600)


@pytest.mark.parametrize("page", ["README.md", "docs/deploy.md", "deploy/submit.sh"])
def test_the_command_that_pages_give_makes_it_so(page: str, token: Path):
    text = (ROOT / page).read_text()
    assert len(re.findall(r"get-auth-token --generate", text)) == text.count(COMMAND) == 1
    if page == "README.md":
        subprocess.run(["bash", "-c", COMMAND], check=True, capture_output=True)
        assert mode(token) == 0o600
