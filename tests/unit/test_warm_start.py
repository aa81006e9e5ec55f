"""The warm start: what GRPO starts from, and that what was done is not done again."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from rft_cluster import launch, warm_start
from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.report import summary
from rft_cluster.run.answers import write_answers
from rft_cluster.run.history import read_history
from rft_cluster.run.inside import (
    WARM_START_FILE,
    keeps_warm_start,
    read_warm_start,
    runs_inside,
    usual_sft_rate,
    warm_start_run,
)
from rft_cluster.run.journal import settings_digest
from rft_cluster.run.preflight import check_warm_start, sft_note
from rft_cluster.run.records import read_rows
from rft_cluster.run.resume import find_start
from tests.unit.run.begun import TASK as WITHOUT_VALIDATION
from tests.unit.run.begun import config
from tests.unit.test_train import SETTINGS, TARGETS, TASK, Failing, Reporting

WARM = (*SETTINGS, "schedule.warm_start={steps: 4}", "optimizer.sft_learning_rate=0.25")


def judged(right: int) -> list[Judged]:
    return [Judged(str(i), "rose", "", None, i < right, False, True) for i in range(2)]


@pytest.fixture
def done(monkeypatch) -> SimpleNamespace:
    """In place of the training and the generators. `right`: of two validation images, before and after SFT."""
    asked: list[str] = []
    right = {"before": 0, "after": 1}

    def train_inside(own: Config, task, model_path: str) -> None:
        asked.append(f"{own.run.name} from {model_path}")
        own.run_folder.mkdir(parents=True, exist_ok=True)
        write_answers(own.run_folder, own.schedule.steps, "validation", judged(right["after"]))

    def greedy_answers(own, task, model_path, examples, split):
        asked.append(f"{len(examples)} of {split}")
        return judged(right["before"])

    monkeypatch.setattr(warm_start, "train_inside", train_inside)
    monkeypatch.setattr(warm_start, "greedy_answers", greedy_answers)
    return SimpleNamespace(asked=asked, right=right)


def test_without_one_nothing_happens(tmp_path, done):
    assert warm_start.warm_started(config(tmp_path, *SETTINGS), TASK, "base", None) == "base"
    assert done.asked == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("before", "after", "kept"), [(0, 1, True), (1, 1, False), (2, 1, False)])
def test_it_is_kept_if_more_validation_images_are_right(tmp_path, done, capsys, before, after, kept):
    done.right |= {"before": before, "after": after}
    settings = config(tmp_path, *WARM)
    warm = str(tmp_path / "mine" / "warm_start" / "model")
    for _ in range(2):
        assert warm_start.warm_started(settings, TASK, "base", "tiny") == (warm if kept else "base")
    assert done.asked == ["warm_start from base", "2 of validation", "warm_start from base"], "asked once"
    record = read_warm_start(settings.run_folder)
    assert record.model_dump() == {"steps": 4, "kept": kept, "validation": (before / 2, after / 2), "images": 2}
    assert keeps_warm_start(settings.run_folder) == kept
    said = f"validation accuracy {50 * before:.1f} % before and {50 * after:.1f} % after (2 images): "
    assert said + ("GRPO starts from it" if kept else "it is not kept") in capsys.readouterr().out


def test_it_is_sft_with_its_own_steps_and_learning_rate(tmp_path):
    settings = config(tmp_path, *WARM, "schedule.min_live=0.5")
    own = warm_start_run(settings)
    assert runs_inside(settings) == [own]
    assert (own.run_folder, own.run.seed) == (tmp_path / "mine" / "warm_start", settings.run.seed)
    assert (own.algorithm.objective, own.algorithm.kl_beta, own.optimizer.learning_rate) == ("sft", 0.0, 0.25)
    assert (own.schedule.steps, own.schedule.evaluate_every, own.schedule.warm_start) == (4, 4, None)
    assert Config.model_validate(own.model_dump()) == own, "it is a valid configuration"
    assert settings_digest(settings) != settings_digest(config(tmp_path, *SETTINGS)), "policies depend on it"


@pytest.mark.parametrize(
    ("model", "changes", "usual"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", {}, 1e-5),
        ("Qwen/Qwen2-VL-2B-Instruct", {"learning_rate": 2e-6}, 2e-5),
        ("Qwen/Qwen2-VL-2B-Instruct", {"sft_learning_rate": 3e-5}, None),
        ("tiny", {}, None),
    ],
)
def test_sft_at_the_rate_of_grpo_is_told(tmp_path, model, changes, usual):
    settings = config(tmp_path, *SETTINGS, "schedule.warm_start={steps: 4}")
    rates = {"learning_rate": 1e-6, "sft_learning_rate": None} | changes
    settings = settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"path": model}),
            "optimizer": settings.optimizer.model_copy(update=rates),
        }
    )
    assert usual_sft_rate(settings) == usual
    notes = sft_note(settings)
    assert len(notes) == (usual is not None) and all(f"optimizer.sft_learning_rate={usual:g}" in one for one in notes)
    alone = settings.model_copy(update={"schedule": settings.schedule.model_copy(update={"warm_start": None})})
    assert sft_note(alone) == []


@pytest.mark.parametrize("damage", ["", "{}", '{"steps": 4, "kept": 1, "validation": [0, 1], "images": 2}', "[]"])
def test_a_damaged_record_is_none(tmp_path, damage):
    (tmp_path / WARM_START_FILE).write_text(damage)
    assert read_warm_start(tmp_path) is None and not keeps_warm_start(tmp_path)


def test_without_validation_images_or_before_sft_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there are none: set data.validation"):
        check_warm_start(config(tmp_path, *WARM), WITHOUT_VALIDATION)
    check_warm_start(config(tmp_path, *WARM), TASK)
    with pytest.raises(UserError, match=r"schedule.warm_start is SFT before GRPO, but algorithm.objective is sft"):
        load_config("digits", ["schedule.warm_start={steps: 4}", "algorithm.objective=sft", "algorithm.kl_beta=0"])


def test_a_run_that_dies_in_its_warm_start_goes_on_there(tmp_path, monkeypatch):
    """Real loop, folders and journal; the actors only count. The learners die once in each of two steps."""
    settings = config(tmp_path, *WARM, "schedule.save_every=2", "cluster.restarts=0")
    failures, started = {3: RuntimeError("died")}, []

    @contextmanager
    def start_cluster(own: Config, model_path: str, *_):
        roles = Failing(failures)
        started.append((own.run.name, Path(model_path).name, roles))
        yield roles

    for name, one in {
        "training.start_cluster": start_cluster, "run.task.base_model_path": lambda *_: "untouched",
        "training.read_targets": lambda own, *_: None if own.algorithm.samples else TARGETS,
        "comparison.compare": lambda *_: None, "run.thumbnails.keep_thumbnails": lambda *_: None,
        "cluster.metrics.RunMetrics.exported": lambda *_: nullcontext(),
        "run.reporting.Reports": lambda _: nullcontext(Reporting()),
        "warm_start.greedy_answers": lambda *_: judged(0),
    }.items():  # fmt: skip
        monkeypatch.setattr(f"rft_cluster.{name}", one)
    log = SimpleNamespace(write_to=lambda _: None)
    with pytest.raises(RuntimeError, match="died"):
        launch._run(settings, TASK, find_start(settings, resume=False), log, ["launch"])
    start = find_start(settings, resume=True)
    assert start.step == 0 and start.manifest is not None, "it goes on with its images"
    launch._run(settings, TASK, start, log, ["launch"])

    assert [(name, model) for name, model, _ in started] == [
        ("warm_start", "untouched"), ("warm_start", "untouched"), ("mine", "model")
    ]  # fmt: skip
    assert [roles.calls.count("learning") for *_, roles in started] == [2, 2, 6], "2 of 4 were saved"
    assert started[1][2].calls.count("asking") == 0 and started[2][2].calls.count("asking") == 6
    warm = read_history(settings.run_folder / "warm_start")
    assert warm.state == "done" and "inside another run" in summary.sentence(warm)
    for folder, steps in ((settings.run_folder, 6), (settings.run_folder / "warm_start", 4)):
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, steps + 1))
