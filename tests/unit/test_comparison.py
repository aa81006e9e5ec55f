"""The baselines that a configuration asks for, without actors: what each is, what is kept, and what is done again."""

import json
import shlex
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rft_cluster import comparison
from rft_cluster.classification.baselines import BASELINES, compared, to_ask
from rft_cluster.classification.report import summarise
from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.config import Config
from rft_cluster.model.image_encoder import ImageEncoder
from rft_cluster.prompts import make_prompts, make_question
from rft_cluster.report import summary
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.history import read_history
from rft_cluster.run.inside import WARM_START_FILE, WarmStart, sft_baseline, warm_start_run
from rft_cluster.run.preflight import check_baselines
from rft_cluster.run.saving import is_complete
from rft_cluster.run.task import Task, with_classes_listed
from tests.unit.report.whole import SETTINGS, answered, dataset, written
from tests.unit.run.begun import config

DATA = dataset("")
TASK = Task(DATA, make_question("think_answer", "flower", DATA.classes))
COMMAND = ["python", "-m", "rft_cluster.launch", "--config", "my photos.yaml", "--resume"]
FEATURES = {sha256: np.array([number % 2, 1.0]) for number, sha256 in enumerate(compared(DATA))}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> SimpleNamespace:
    """In place of all that needs Ray. `asked`: what was started. The untouched model is right on 3 of 4 images when it
    is given the classes, and SFT on the first."""
    written(tmp_path)
    asked: list[tuple] = []

    def features_of(settings, path, images, seeing=None):
        asked.append(("features", path, seeing))
        return FEATURES, ""

    def train_inside(settings: Config, task: Task, model_path: str) -> None:
        asked.append(("sft", settings, model_path))
        prompts = make_prompts(DATA.test, "Which flower?", "test", settings.schedule.steps, 0)
        groups = [answered([p], [p.label if i == 0 else "none"], "")[0] for i, p in enumerate(prompts)]
        RunFolder(settings, task).log_evaluation(summarise(settings.schedule.steps, "test", groups), groups)

    @contextmanager
    def start_generators(settings, path, images):
        def generate(prompts, sampling, version):
            asked.append(("closed", prompts[0].text, sampling.temperature))
            return [answered([p], [p.label if i < 3 else "none"], "")[0] for i, p in enumerate(prompts)]

        yield SimpleNamespace(generate=generate)

    monkeypatch.setattr("rft_cluster.training.start_generators", start_generators)
    for name, one in {"features_of": features_of, "train_inside": train_inside,
                      "base_model_path": lambda *_: "base"}.items():  # fmt: skip
        monkeypatch.setattr(comparison, name, one)
    return SimpleNamespace(asked=asked, started=lambda: [kind for kind, *_ in asked])


def settings_of(folder: Path, *asked: str) -> Config:
    words = [f"baselines=[{','.join(asked)}]", *(["evaluation.encoder=enc"] if "encoder" in asked else [])]
    return config(folder, *SETTINGS, *words)


def record_of(folder: Path) -> dict:
    return json.loads((folder / "mine" / "baselines.json").read_text())


def test_each_baseline_that_is_asked_for_is_measured_and_enters_verdict_and_record(tmp_path, cluster, capsys):
    settings = settings_of(tmp_path, "base", "base_closed", "sft", "encoder")
    comparison.compare(settings, TASK, "started/from", COMMAND)
    record = record_of(tmp_path)
    assert list(record["right"]) == [*BASELINES, "base", "base_closed", "sft", "encoder_neighbour", "encoder_probe"]
    assert [record["right"][name] for name in ("base", "base_closed", "sft")] == ["1010", "1110", "1000"]
    assert record["encoder_probe"] == record["tower_probe"] == 1.0  # the same features
    assert cluster.started() == ["features", "closed", "sft", "features"]
    assert cluster.asked[-1][1:] == ("enc", ImageEncoder)
    (_, text, temperature), (_, sft, model_path) = cluster.asked[1:3]
    assert "It is one of these:\nrose\ntulip\n" in text and temperature == 0.0
    assert (sft.algorithm.objective, sft.algorithm.kl_beta, model_path) == ("sft", 0.0, "started/from")
    assert (sft.schedule.steps, sft.schedule.prompts_per_step, sft.run.seed) == (2, 2, settings.run.seed)
    assert (sft.run_folder, sft.baselines) == (tmp_path / "mine" / "baselines" / "sft", [])
    said = capsys.readouterr().out
    assert "for comparison, the untouched model with the classes listed: test accuracy 75.0 %" in said
    assert "for comparison, supervised fine-tuning with the same 2 images: test accuracy 25.0 %" in said
    assert "linear probe on the encoder's features of the same 2 images" in said and "to compare with" not in said
    assert list(read_history(tmp_path / "mine").right) == list(record["right"])


def test_without_any_a_line_has_the_command_that_measures_them(tmp_path, cluster, capsys):
    comparison.compare(settings_of(tmp_path), TASK, "started/from", COMMAND)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("to compare"))
    words = shlex.split(line.partition("too: ")[2])
    assert words == [*COMMAND[:-1], "--resume", "baselines=[base_closed,sft]"]
    assert cluster.started() == ["features"]
    assert to_ask(COMMAND, 1e-5).endswith("optimizer.sft_learning_rate=1e-05")


def test_one_that_cannot_be_measured_is_said_and_tried_again(tmp_path, cluster, monkeypatch, capsys):
    def fails(*_):
        raise ClusterError("a learner died\nmore")

    settings, works = settings_of(tmp_path, "base_closed", "sft"), comparison.train_inside
    (tmp_path / "mine" / "model").mkdir()
    monkeypatch.setattr("rft_cluster.run.saving.exported", lambda _: SimpleNamespace(steps=2))
    monkeypatch.setattr("rft_cluster.run.saving.is_calibrated", lambda _: True)
    monkeypatch.setattr(comparison, "train_inside", fails)
    comparison.compare(settings, TASK, "", COMMAND)
    assert "no baseline sft: a learner died\n" in capsys.readouterr().out
    assert (record_of(tmp_path)["missing"], is_complete(settings)) == ({"sft": "a learner died"}, False)
    monkeypatch.setattr(comparison, "train_inside", works)
    comparison.compare(settings, TASK, "", COMMAND)
    assert "missing" not in record_of(tmp_path) and is_complete(settings)
    assert cluster.started().count("closed") == 1, "what is known is not asked again"


def test_what_was_measured_earlier_is_kept_unless_its_settings_have_changed(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr("rft_cluster.run.saving.is_trained", lambda _: True)
    monkeypatch.setattr("rft_cluster.run.saving.is_calibrated", lambda _: True)

    def slower(settings: Config) -> Config:
        rate = settings.optimizer.model_copy(update={"sft_learning_rate": 1e-5})
        return settings.model_copy(update={"optimizer": rate})

    def compare(*asked: str, **changed) -> tuple[list[str], list[str]]:
        """What is on record then, and what was started."""
        settings, before = settings_of(tmp_path, *asked), len(cluster.asked)
        for key, value in changed.items():
            section, _, name = key.partition("__")
            part = getattr(settings, section).model_copy(update={name: value})
            settings = settings.model_copy(update={section: part})
        if is_complete(settings):
            return [], []
        comparison.compare(settings, TASK, "", COMMAND)
        assert is_complete(settings)
        return sorted(record_of(tmp_path)["right"].keys() - BASELINES.keys()), cluster.started()[before + 1 :]

    encoder = ["encoder_neighbour", "encoder_probe"]
    assert compare("base_closed", "sft") == (["base_closed", "sft"], ["closed", "sft"])
    assert compare("base_closed", "sft") == ([], []), "the run is complete"
    assert compare("encoder") == (["base_closed", *encoder, "sft"], ["features"])
    assert compare("encoder", evaluation__encoder=Path("other")) == (["base_closed", *encoder, "sft"], ["features"])
    assert compare("base") == (["base", "base_closed", *encoder, "sft"], [])
    assert compare("encoder", evaluation__encoder=Path("other")) == ([], []), "it is still on record"
    left = ["base", "base_closed", *encoder]
    assert compare("base_closed", schedule__steps=3) == ([], []), "what the user has not asked about may wait"
    comparison.compare(other := slower(settings_of(tmp_path, "sft")), TASK, "", COMMAND)
    folder = sft_baseline(other).run_folder
    assert record_of(tmp_path)["missing"]["sft"] == (
        f"{folder} was trained with a learning rate of 0.0005: remove that folder to train with 1e-05"
    )
    shutil.rmtree(folder)
    assert compare("sft", optimizer__sft_learning_rate=1e-5) == ([*left, "sft"], ["sft"])
    assert compare("sft", optimizer__sft_learning_rate=1e-5) == ([], [])
    comparison.compare(settings_of(tmp_path), TASK, "", COMMAND)  # SFT had another learning rate than this run's
    assert record_of(tmp_path)["right"].keys() == {*BASELINES, *left}


def test_a_run_whose_own_question_lists_the_classes_has_answered_already(tmp_path, cluster):
    task = Task(DATA, make_question("closed", "digit", DATA.classes))  # as the configuration's subject is
    comparison.compare(settings_of(tmp_path, "base_closed"), task, "", COMMAND)
    assert record_of(tmp_path)["right"]["base_closed"] == "1010" and cluster.started() == ["features"]


def test_what_cannot_be_measured_at_the_end_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match=r"^evaluation.encoder: enc has no config.json: name the folder of an image"):
        check_baselines(settings_of(tmp_path, "encoder"), TASK, None)


def test_the_list_of_classes_has_room_beside_the_largest_image(tmp_path):
    """102 names are 500 tokens more than the run's own question, and `model.max_prompt_tokens` is the run's."""
    settings = settings_of(tmp_path, "base_closed")
    closed, asked = with_classes_listed(settings, TASK)
    names = sum(len(name) for name in DATA.classes)
    assert closed.model.max_prompt_tokens >= settings.model.max_prompt_tokens + names
    assert all(name in asked.text for name in DATA.classes)
    tight = settings.model_copy(update={"model": settings.model.model_copy(update={"max_prompt_tokens": 16})})
    task = Task(replace(DATA, pool=[*DATA.images.values()] * 10), TASK.question)
    check_baselines(tight, task, None)
    # However many there are, the small model's window holds them; a run that lists them itself has room already.
    wide = settings.model_copy(update={"model": settings.model.model_copy(update={"max_prompt_tokens": 2000})})
    closed, asked = with_classes_listed(wide, TASK)
    assert closed.max_model_tokens <= 2048
    assert with_classes_listed(closed, asked)[0].model.max_prompt_tokens == closed.model.max_prompt_tokens


def test_without_test_images_there_is_nothing_to_compare(tmp_path):
    task = Task(replace(DATA, test=[]), TASK.question)
    with pytest.raises(UserError, match=r"there are none: set data.test, or baselines=\[\]$"):
        check_baselines(settings_of(tmp_path, "base"), task, None)


def test_an_encoder_needs_its_folder_named():
    from rft_cluster.config import load_config

    with pytest.raises(UserError, match=r"baselines has encoder, .*: set evaluation.encoder to it"):
        load_config("digits", ["baselines=[encoder]"])


def test_after_a_warm_start_the_untouched_model_is_the_one_before_it(tmp_path, cluster, capsys):
    settings = config(tmp_path, *SETTINGS, "baselines=[base]", "schedule.warm_start={steps: 2}")
    record = WarmStart(steps=2, kept=True, validation=(0.1, 0.5), images=10)
    (settings.run_folder / WARM_START_FILE).write_text(record.model_dump_json())
    comparison.compare(settings, TASK, "", COMMAND)
    assert "no baseline base: the run has no record of the answers before training" in capsys.readouterr().out
    own = warm_start_run(settings)
    prompts = make_prompts(DATA.test, "Which flower?", "test", 0, 0)
    groups = [answered([prompt], [prompt.label if i == 2 else "none"], "")[0] for i, prompt in enumerate(prompts)]
    RunFolder(own, TASK).log_evaluation(summarise(0, "test", groups), groups)
    comparison.compare(settings, TASK, "", COMMAND)
    assert record_of(tmp_path)["right"]["base"] == "0010"
    said = capsys.readouterr().out
    assert "+50.0 points (" in said and "over the warm-started model" in said
    (row, *_) = summary.accuracies(read_history(settings.run_folder), 2)
    assert row["name"] == "After the warm start, 2 steps of SFT" and "from 10.0 % to 50.0 %" in row["what"]
