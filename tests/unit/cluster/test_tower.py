"""Features for baselines: what is in the cache is not computed again, and a finished run never fails for them."""

from pathlib import Path

import numpy as np
import pytest

from rft_cluster.cluster import tower
from rft_cluster.common.errors import ClusterError, UserError
from tests.unit.run.begun import config

IMAGES = {"a" * 64: b"one", "b" * 64: b"two", "c" * 64: b"three"}


def look(image: bytes) -> np.ndarray:
    return np.array([len(image), image[0]], np.float32)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tower, "CACHE", tmp_path / "cache")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class Tower:
    """In place of the actor. `error`: what its start ends with."""

    def __init__(self, monkeypatch, error: Exception | None = None) -> None:
        self.seen: list[bytes] = []
        self._error = error
        monkeypatch.setattr(tower, "_started", self)

    def __call__(self, config, path, seeing):
        return self

    def __enter__(self):
        if self._error:
            raise self._error
        return self._look

    def __exit__(self, *_) -> None:
        pass

    def _look(self, image: bytes) -> np.ndarray:
        self.seen.append(image)
        return look(image)


def test_each_image_is_looked_at_once(model, tmp_path, monkeypatch):
    actor, settings = Tower(monkeypatch), config(tmp_path)
    two = dict(list(IMAGES.items())[:2])
    rows, skipped = tower.features_of(settings, str(model), two)
    assert skipped == "" and rows is not None and list(rows) == list(two)
    again, _ = tower.features_of(settings, str(model), IMAGES)
    assert sorted(actor.seen[:2]) == [b"one", b"two"] and actor.seen[2:] == [b"three"]
    assert {name: row.tolist() for name, row in again.items()} == {n: look(i).tolist() for n, i in IMAGES.items()}
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_image_that_is_shown_otherwise_is_looked_at_anew(model, tmp_path, monkeypatch):
    """Its file is the same: it is shrunk less, or other 16-bit values are black and white."""
    actor, settings = Tower(monkeypatch), config(tmp_path)
    for shown in (b"dark", b"bright"):
        rows, _ = tower.features_of(settings, str(model), {"a" * 64: shown})
        assert rows is not None and rows["a" * 64].tolist() == look(shown).tolist()
    assert actor.seen == [b"dark", b"bright"]


@pytest.mark.parametrize("changed", ["weights", "processor", "pixels", "dtype"])
def test_another_model_or_another_size_is_looked_at_anew(changed, model, tmp_path, monkeypatch):
    actor, settings = Tower(monkeypatch), config(tmp_path, "cluster.dtype=float32")
    tower.features_of(settings, str(model), IMAGES)
    match changed:
        case "weights":
            (model / "model.safetensors").write_bytes(b"WEIGHTS")
        case "processor":
            (model / "preprocessor_config.json").write_text("{}")
        case "pixels":
            settings = config(tmp_path, "cluster.dtype=float32", "model.max_image_tokens=8")
        case "dtype":
            settings = config(tmp_path, "cluster.dtype=bfloat16")
    tower.features_of(settings, str(model), IMAGES)
    assert len(actor.seen) == 2 * len(IMAGES)


def test_a_damaged_cache_is_made_anew(model, tmp_path, monkeypatch):
    actor, settings = Tower(monkeypatch), config(tmp_path)
    tower.features_of(settings, str(model), IMAGES)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    rows, _ = tower.features_of(settings, str(model), IMAGES)
    assert rows is not None and len(actor.seen) == 2 * len(IMAGES)


@pytest.mark.parametrize("error", [UserError("no memory"), ClusterError("vision-tower died", ["vision-tower"])])
def test_a_loss_or_a_mistake_becomes_a_reason(error, model, tmp_path, monkeypatch):
    Tower(monkeypatch, error)
    assert tower.features_of(config(tmp_path), str(model), IMAGES) == (None, str(error))
    assert not (tmp_path / "cache").exists()


def test_features_that_cannot_be_kept_are_used_all_the_same(model, tmp_path, monkeypatch, capsys):
    Tower(monkeypatch)
    settings = config(tmp_path)
    (tmp_path / "cache").write_text("a file is in the way")
    rows, _ = tower.features_of(settings, str(model), IMAGES)
    assert rows is not None and rows.keys() == IMAGES.keys()
    assert "WARNING: these features cannot be kept" in capsys.readouterr().out


def test_a_model_that_is_gone_becomes_a_reason(tmp_path, monkeypatch):
    Tower(monkeypatch)
    rows, skipped = tower.features_of(config(tmp_path), str(tmp_path / "gone"), IMAGES)
    assert rows is None and "there is no folder" in skipped


@pytest.mark.parametrize(("seconds", "done"), [(0.5, 1000), (2.5, 9)])
def test_what_would_take_too_long_is_given_up_early(seconds, done):
    """1000 images, and 15 minutes: at half a second each they are done in time."""
    now, seen = [0.0], []

    def slow(image: bytes) -> np.ndarray:
        now[0] += seconds
        seen.append(image)
        return look(image)

    names = [f"{number:064}" for number in range(1000)]
    images = dict.fromkeys(names, b"image")
    if done == 1000:
        assert len(tower.look_at(names, images, slow, clock=lambda: now[0])) == 1000
    else:
        with pytest.raises(UserError, match="would need 42 minutes for 1000 images"):
            tower.look_at(names, images, slow, clock=lambda: now[0])
        assert len(seen) == done  # after 20 s
