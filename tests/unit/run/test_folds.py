"""Cross-validation: which runs there are, and the figure of all of them."""

import json
from pathlib import Path

import pytest

from rft_cluster import launch
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.data import load_dataset, manifest
from rft_cluster.run.folds import fold_configs, pool_folds, write_folds
from tests.unit.data.test_layouts import fill


def config_of(tmp_path: Path, *overrides: str) -> Config:
    paths = [f"run.folder={tmp_path}/runs", f"data.path={tmp_path}/photos"]
    shape = ["data.source=folder", "data.shots=2", "data.validation=1", "data.folds=3"]
    return load_config("digits", ["run.name=mine", *paths, *shape, *overrides])


def finish(config: Config, right: list[int]) -> None:
    """Write the files of finished runs: manifests of real splits, and last evaluations."""
    for fold, count in zip(fold_configs(config), right, strict=True):
        fold.run_folder.mkdir(parents=True)
        dataset = load_dataset(fold.data, fold.run.seed)
        (fold.run_folder / "manifest.json").write_text(json.dumps(manifest(dataset, fold.run.seed)))
        n = len(dataset.test)
        rows = [
            {"step": step, "split": "test", "n": n, "accuracy_strict": value / n}
            for step, value in ((0, 0), (3, count))
        ]
        (fold.run_folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_folds_are_runs_of_their_own_below_the_run(tmp_path):
    folds = fold_configs(config_of(tmp_path))
    assert [fold.run_folder for fold in folds] == [tmp_path / f"runs/mine/fold-{k}" for k in (1, 2, 3)]
    assert [fold.data.fold for fold in folds] == [1, 2, 3]
    with pytest.raises(UserError, match=r"leave one of them out"):
        fold_configs(config_of(tmp_path, f"data.manifest={tmp_path}/m.json"))


def test_the_figure_is_of_all_images_each_tested_once(tmp_path):
    fill(tmp_path / "photos", count=10)  # 20 images: folds of 7, 7 and 6
    config = config_of(tmp_path)
    finish(config, [7, 5, 3])
    pooled = pool_folds(config)
    assert (pooled["right"], pooled["n"]) == (15, 20)
    assert [fold["n"] for fold in pooled["folds"]] == [7, 7, 6]
    assert pooled["interval"] == pytest.approx((0.531, 0.888), abs=0.001)  # Wilson's of 15 in 20
    text = write_folds(config)
    assert "3 folds together: test accuracy 75.0 % (95 % interval 53.1 to 88.8, 20 images" in text
    assert "folds: 100.0, 71.4, 50.0 %" in text
    assert json.loads((tmp_path / "runs/mine/folds.json").read_text())["right"] == 15


def test_data_that_changed_between_the_folds_are_refused(tmp_path):
    fill(tmp_path / "photos", count=10)
    config = config_of(tmp_path)
    finish(config, [7, 5, 3])
    first, second = (tmp_path / f"runs/mine/fold-{k}/manifest.json" for k in (1, 2))
    second.write_text(first.read_text())
    with pytest.raises(UserError, match=r"test images twice: the data changed"):
        pool_folds(config)


def test_launch_runs_every_fold_in_turn_and_then_says_the_figure(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "photos", count=10)
    config, begun = config_of(tmp_path), []
    once = launch.launch

    def train(one: Config, dry_run: bool, resume: str, command: list[str]) -> None:
        if one.data.fold:
            begun.append((one.data.fold, one.run.name, resume))
        else:
            once(one, dry_run, resume, command)

    monkeypatch.setattr(launch, "launch", train)
    finish(config, [7, 5, 3])
    launch.launch(config, dry_run=False, resume="yes", command=[])
    assert begun == [(1, "fold-1", "auto"), (2, "fold-2", "auto"), (3, "fold-3", "auto")]
    assert "3 folds together: test accuracy 75.0 %" in capsys.readouterr().out
