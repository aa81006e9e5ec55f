"""The tier *several*: what its checks say of the runs' records."""

from dataclasses import replace

import pytest

from benchmarks.gpu_check import several
from benchmarks.gpu_check.checklist import Bench
from benchmarks.gpu_check.shared import Run

GPU = Bench("cuda", "true", None)
CHECKS = {check.name: check for check in several.CHECKS}


def row(staleness: int, **changes) -> dict:
    times = {"seconds/generate": 1.0, "seconds/learn": 2.0, "seconds/transfer": 1.0}
    return {"logprob_gap": 0.01, "grad_norm": 3.0, "staleness_max": staleness, **times, **changes}


def good(setting: str) -> Run:
    rows = [row(0), row(1), row(1)] if setting == "prefetch" else [row(0)] * 3
    return Run("nccl", 60.0, rows, {}, ([1, 1], [2, 2]), {"generator-0": 3, "generator-1": 3})


@pytest.fixture
def see(monkeypatch):
    """Makes checks see good runs, but for the changes of one setting's."""

    def see(setting: str = "", **changes) -> None:
        monkeypatch.setattr(several, "run", lambda _, name: replace(good(name), **(changes if name == setting else {})))

    return see


def test_good_runs_pass(see):
    see()
    assert [name for name, check in CHECKS.items() if not check.run(GPU).passed] == []


@pytest.mark.parametrize(
    ("setting", "check", "changes"),
    [
        ("2 generators", "version held, verified", {"held": {"generator-0": 3, "generator-1": 2}}),
        ("2 generators", "version held, verified", {"loaded": ([1, 1], [2, 1])}),  # one kept its old weights
        ("3 generators", "version held, verified", {"transfer": "shared_memory"}),
        ("tensor parallelism 2", "log-prob gap", {"rows": [row(0), row(0, logprob_gap=0.17), row(0)]}),
        ("prefetch", "staleness", {"rows": [row(0)] * 3}),  # nothing was prefetched
        ("prefetch", "staleness", {"rows": [row(0), row(1), row(2)]}),
        ("2 learners", "gradient over that of one", {"rows": [row(0, grad_norm=1.5), row(0), row(0)]}),
    ],
)
def test_a_bad_run_fails_its_check(see, setting, check, changes):
    see(setting, **changes)
    assert not CHECKS[f"{setting}: {check}"].run(GPU).passed


def test_each_setting_gets_as_many_gpus_as_it_needs():
    gpus = {name.partition(":")[0]: check.gpus for name, check in CHECKS.items()}
    assert gpus == {"1 generator": 2, "prefetch": 2, "2 generators": 3, "3 generators": 4, "2 learners": 3,
                    "tensor parallelism 2": 3}  # fmt: skip


@pytest.mark.parametrize("setting", several.SETTINGS)
def test_the_gpus_of_a_setting_s_roles(monkeypatch, tmp_path, setting):
    """What it asks the cluster for is what the check says it needs, none of it shared."""
    from benchmarks.gpu_check.material import run_config
    from rft_cluster.cluster.placement import bundles

    monkeypatch.setattr(several.shared, "steps_of", lambda bench, name, *changes: run_config(bench, *changes))
    config = several.run(Bench("cuda", "tiny", tmp_path), setting)
    assert sum(bundle.gpus for bundle in bundles(config)) == several.SETTINGS[setting][0]
    assert not config.shares_gpus
    # An update of random weights may move log-probabilities by less than rounding does, where a gap spans one.
    assert config.optimizer.learning_rate == (1e-7 if config.schedule.max_staleness else 1e-6)
