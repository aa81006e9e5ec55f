import contextlib
import re
from importlib.machinery import BuiltinImporter, ModuleSpec, PathFinder

import pytest

from rft_cluster import launch
from rft_cluster.common.errors import UserError
from rft_cluster.tracking import start
from rft_cluster.tracking.background import Background
from rft_cluster.tracking.start import check_tracking, tracked
from tests.unit.run.begun import DATASET, config

KEYS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def missing(monkeypatch, *names: str) -> None:
    found = ModuleSpec("found", BuiltinImporter)
    monkeypatch.setattr(start, "find_spec", lambda name: None if name in names else found)


@pytest.mark.parametrize(
    ("asked", "absent", "cure"),
    [
        ("[tensorboard, wandb]", "wandb", "tracking=[tensorboard]"),
        ("[tensorboard]", "tensorboard", "tracking=[]"),
    ],
)
def test_a_missing_package_is_one_error_with_the_command_that_installs_it(tmp_path, monkeypatch, asked, absent, cure):
    missing(monkeypatch, absent)
    with pytest.raises(UserError, match=re.escape(f"`pip install {absent}`, or leave it out: {cure}")):
        check_tracking(config(tmp_path, f"tracking={asked}"))
    check_tracking(config(tmp_path, cure))


def test_the_folder_that_wandb_makes_where_it_is_used_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(start, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(UserError, match="the package wandb is not installed"):
        check_tracking(config(tmp_path, "tracking=[wandb]"))


def test_it_is_said_before_anything_starts(tmp_path, monkeypatch, capsys):
    missing(monkeypatch, "wandb")
    words = ["--config", "digits", f"run.folder={tmp_path}", "tracking=[wandb]"]
    assert launch.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: tracking: the package wandb is not installed") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [("WANDB_API_KEY", "0" * 40), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("NETRC", "netrc")],
)
def test_without_a_key_wandb_is_refused_as_it_would_ask_for_one(tmp_path, monkeypatch, key, value):
    missing(monkeypatch)
    settings = config(tmp_path, "tracking=[wandb]")
    with pytest.raises(UserError, match=r"W&B has no key for api\.wandb\.ai here: run `wandb login`"):
        check_tracking(settings)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0000\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    monkeypatch.setenv(key, str(tmp_path / value) if key == "NETRC" else value)
    check_tracking(settings)


def test_a_key_for_another_server_does_not_count(tmp_path, monkeypatch):
    missing(monkeypatch)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0000\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    with pytest.raises(UserError, match=r"no key for wandb\.example\.org"):
        check_tracking(config(tmp_path, "tracking=[wandb]"))


def test_trackers_are_closed_when_the_run_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(Background, "close", lambda self: closed.append(self._name))
    with contextlib.suppress(RuntimeError), tracked(config(tmp_path, "tracking=[tensorboard,tensorboard]"), DATASET):
        raise RuntimeError
    assert closed == ["tensorboard"]
    with tracked(config(tmp_path, "tracking=[]"), DATASET) as made:
        assert made == []
