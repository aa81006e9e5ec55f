"""The configuration of an evaluation, for any working folder and any name of the run's folder."""

import argparse
import json
from pathlib import Path

import pytest

from rft_cluster import evaluate
from rft_cluster.config import Config, config_text

FOLDERS = ["runs/mine", "my #1/mine", "[2024] runs/mine", "runs: new/mine", "~me/$HOME", "a~/${HOME}", "no/01", "'/\""]


def run_in(folder: Path, data: str = "photos") -> Path:
    """A finished run, as far as finding its configuration goes."""
    (folder / "model").mkdir(parents=True)
    for name in ("manifest.json", "model/classifier.json"):
        (folder / name).write_text("{}")
    config = {
        "run": {"name": "mine"},
        "model": {"path": "tiny"},
        "data": {"source": "folder", "path": data, "manifest": "/earlier/manifest.json"},
        "rewards": {"my_rewards:brevity": 1},
        "schedule": {"steps": 4, "prompts_per_step": 2},
        "cluster": {"device": "cpu"},
    }
    (folder / "config.yaml").write_text(config_text(Config.model_validate(config)))
    return folder


def configured(export: Path | None, config: str | None = None, *overrides: str) -> Config:
    return evaluate._config(argparse.Namespace(config=config, overrides=list(overrides)), export)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "from elsewhere"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_brings_its_images_and_its_settings(tmp_path, monkeypatch, name, elsewhere):
    run = run_in(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" if elsewhere else tmp_path)
    given = run if elsewhere else Path(name)
    for config in (configured(given / "model"), configured(None, str(given / "config.yaml"))):
        assert config.data.manifest == given / "manifest.json"
        assert config.data.path == (tmp_path / "photos" if elsewhere else Path("photos"))
        assert config.run_folder.absolute() == run.absolute()
        assert config.rewards == {"format": 1.0, "accuracy": 1.0}


def test_what_is_typed_is_the_callers_word(tmp_path):
    run = run_in(tmp_path / "mine")
    overrides = ("data.manifest=my #2/manifest.json", "data.path=[2024] photos", "run.seed=7")
    config = configured(run / "model", None, *overrides)
    assert (config.data.manifest, config.data.path) == (Path("my #2/manifest.json"), Path("[2024] photos"))
    assert config.run.seed == 7
    (tmp_path / "mine.yaml").write_text(json.dumps({**json.loads(OWN), "rewards": {"my_rewards:brevity": 1}}))
    config = configured(run / "model", str(tmp_path / "mine.yaml"))
    assert config.data.manifest is None and config.rewards == {"my_rewards:brevity": 1.0}


OWN = """{"run": {"name": "own"}, "model": {"path": "tiny"}, "data": {"source": "digits"}, "cluster": {"device": "cpu"},
"schedule": {"steps": 4, "prompts_per_step": 2}}"""
