"""The actor by itself: what it is given, without Ray."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from rft_cluster.cluster import alone, class_scorer, tower
from rft_cluster.cluster.nodes import everywhere
from rft_cluster.config import load_config
from rft_cluster.model.tower import VisionTower

ON_A_GPU = ["cluster.device=cuda", "generators.gpus=1", "learners.count=1"]


class Recorder:
    """Ray, and an actor of it: keeps what it is given."""

    def __init__(self) -> None:
        self.given: list = []
        self.options_given: dict = {}

    def options(self, **options) -> "Recorder":
        self.options_given = options
        return self

    def remote(self, *arguments) -> "Recorder":
        self.given.append(arguments)
        return self


@pytest.fixture
def ray(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(alone, "ray", SimpleNamespace(remote=lambda _: recorder, shutdown=lambda: None))
    for name in ("connect", "ask_addresses", "wait_for"):
        monkeypatch.setattr(alone, name, lambda *_, **__: {})
    return recorder


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 0),
        ([*ON_A_GPU, "learners.gpus=1"], 1),
        (["cluster.device=cuda", "generators.gpus=0.4", "learners.gpus=0.6", "learners.count=1"], 1),
    ],
    ids=["CPU", "GPU", "shared"],
)
def test_it_has_a_gpu_for_itself_also_where_a_learner_shares_its_own(ray, overrides, gpus):
    with alone.alone(load_config("digits", overrides), "somebody", Recorder, 1):
        assert (ray.options_given["num_gpus"], ray.given) == (gpus, [(1,)])


def test_a_folder_is_the_same_on_every_node_and_a_hub_s_name_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert everywhere("model") == str(tmp_path / "model")
    assert everywhere("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"


def test_lone_actors_get_paths_that_mean_the_same_on_their_nodes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    actor, started = SimpleNamespace(load=Recorder()), list[tuple]()

    @contextmanager
    def recorded(*arguments):
        started.append(arguments)
        yield actor

    for module in (class_scorer, tower):
        monkeypatch.setattr(module, "alone", recorded)
    monkeypatch.setattr(class_scorer, "wait_for", lambda *_: [])
    with class_scorer.scorers(load_config("digits", [])) as scorer_of:
        scorer_of("model")
    assert actor.load.given == [(str(tmp_path / "model"),)]
    with tower._started(load_config("digits", []), "model", VisionTower):
        assert started[-1][3] == str(tmp_path / "model")
