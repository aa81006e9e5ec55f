"""The commands, given a run folder made to do harm: nothing of it runs, and no absurd number is believed."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rft_cluster import compare, evaluate, launch, predict
from rft_cluster.classification.card import CARD_FILE, Card, read_card
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import write_text
from rft_cluster.config import ModelSection
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.folder import check_model_folder
from rft_cluster.model.tiny.build import untrained
from rft_cluster.prompts import Question, render_template, text_hash

QUESTION = "Which flower is it?"
PIXELS = 56 * 56
CONFIG: dict[str, dict[str, Any]] = {
    "run": {"name": "theirs"},
    "model": {"path": "tiny", "min_pixels": PIXELS, "max_pixels": PIXELS},
    "data": {"source": "folder", "path": "photos"},
    "prompt": {"subject": "flower"},
    "schedule": {"steps": 4, "prompts_per_step": 2},
    "cluster": {"device": "cpu"},
}
CARD: dict[str, Any] = {
    "dataset": "flowers",
    "classes": ["rose", "tulip"],
    "aliases": {},
    "prompt": QUESTION,
    "prompt_sha256": text_hash(QUESTION),
    "min_pixels": PIXELS,
    "max_pixels": PIXELS,
    "max_prompt_tokens": 128,
    "max_tokens": 16,
    "temperature": 1.0,
    "steps": 4,
}
PER_CLASS = "{{ 6 // (classes | length - 2) }}"  # a template that fails on two classes
ABSURD = [10**12, -1, float("nan"), float("inf"), 1e300, int("9" * 400)]
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass C:\n    pass\nsteal = load = C\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    processor, policy = untrained(40, ["rose", "tulip"], Question(QUESTION), PIXELS)
    policy.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(model, tmp_path, monkeypatch) -> Path:
    """A finished run of theirs, in `runs/`; the working folder is ours, where their module can be imported from."""
    run = tmp_path / "runs" / "theirs"
    shutil.copytree(model, run / "model")
    (run / "model" / CARD_FILE).write_text(json.dumps(CARD))
    (run / "config.yaml").write_text(json.dumps(CONFIG))
    (tmp_path / "canary.py").write_text(CODE)
    (run / "model" / "canary.py").write_text(CODE)
    (tmp_path / "secret.txt").write_text("the secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield run
    assert not list(tmp_path.rglob("ran")), "code of theirs ran"
    assert not [line for line in tmp_path.rglob("*.json") if "the secret" in line.read_text(errors="ignore")]


def change(file: Path, key: str, value: Any) -> None:
    config = json.loads(file.read_text())
    section, _, name = key.partition(".")
    config.setdefault(section, {})[name] = value
    file.write_text(json.dumps(config))


COMMANDS = {
    "evaluate": (evaluate.main, ["--checkpoint", "runs/theirs"]),
    "evaluate its model": (evaluate.main, ["--checkpoint", "runs/theirs/model"]),
    "evaluate the base": (evaluate.main, ["--checkpoint", "base", "--config", "runs/theirs/config.yaml"]),
    "resume": (launch.main, ["--config", "runs/theirs/config.yaml", "--resume"]),
    "resume there": (launch.main, ["--config", "../theirs/config", "--resume"]),
    "dry-run": (launch.main, ["--config", "runs/theirs/config.yaml", "--resume", "--dry-run"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.trust_remote_code", True),
        ("data.source", "canary:load"),
        ("rewards.canary:steal", 1.0),
        ("prompt.template", "secret.txt"),
        ("prompt.template", "../../secret.txt"),
        ("cluster.address", "203.0.113.7:6379"),
        ("cluster.interface", "lo"),
        ("data.manifest", "secret.txt"),
    ],
)
def test_no_command_does_what_a_run_of_others_says(theirs, monkeypatch, capsys, command, key, value):
    main, arguments = COMMANDS[command]
    change(theirs / "config.yaml", key, value)
    if command == "resume there":
        (theirs.parent / "mine").mkdir()
        monkeypatch.chdir(theirs.parent / "mine")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    unused = command.startswith("evaluate") and key in ("rewards.canary:steal", "data.manifest")
    assert (key in error) != unused, error
    assert ("lies in a run's folder" in error) != unused
    assert "the secret" not in error and "Traceback" not in error


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_code_that_a_model_brings_is_not_run(theirs, file):
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    where = theirs / "model" / file
    has = json.loads(where.read_text()) if where.is_file() else {}
    where.write_text(json.dumps({**has, "auto_map": {name: "canary.C" for name in names}}))
    check_model_folder(theirs / "model", 144)
    PromptEncoder(str(theirs / "model"), ModelSection(path=str(theirs / "model"), min_pixels=PIXELS, max_pixels=PIXELS))


# --- numbers


@pytest.mark.parametrize("key", [name for name, field in Card.model_fields.items() if field.annotation in (int, float)])
def test_an_absurd_number_of_a_card_is_refused_by_name(theirs, capsys, key):
    for value in ABSURD:
        (theirs / "model" / CARD_FILE).write_text(json.dumps({**CARD, key: value}))
        started = time.monotonic()
        assert predict.main(["--checkpoint", str(theirs), "photos"]) == 2
        assert time.monotonic() - started < 10
        assert f"{key}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_pixels": 2 * PIXELS}, "min_pixels 6272 is above max_pixels 3136"),
        ({"prompt": "<|image_pad|>", "prompt_sha256": text_hash("<|image_pad|>")}, "special token"),
        (
            {"template": PER_CLASS, "prompt_sha256": Question(QUESTION, PER_CLASS, "", ("rose", "tulip")).sha256},
            "cannot be rendered: integer division or modulo by zero",
        ),
        ({"max_tokens": 4000}, "more than the window"),
        ({"classes": ["rose"]}, "classes: "),
        ({"\x1b[2J": 1}, "Extra inputs"),
    ],
)
def test_a_card_that_contradicts_is_refused(theirs, capsys, change, message):
    (theirs / "model" / CARD_FILE).write_text(json.dumps({**CARD, **change}))
    assert predict.main(["--checkpoint", str(theirs), "photos"]) == 2
    error = capsys.readouterr().err
    assert message in error and "\x1b" not in error


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"steps": ' + "9" * 5000 + "}", "\xff", "null", ""])
def test_a_card_that_is_none_is_refused(theirs, text):
    (theirs / "model" / CARD_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="cannot be read"):
        read_card(theirs / "model")


def numbers(values: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += numbers(value, (*above, name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((*above, name))
    return found


def test_an_absurd_number_of_a_models_configuration_is_refused_by_name(theirs):
    """Every number that transformers wrote, and those that published models have besides."""
    file = theirs / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"sliding_window": 32_768, "rope_theta": 1e6, "rope_scaling": {"rope_theta": 1e6}}
    config["vision_config"] |= {"in_chans": 3}
    keys = numbers(config)
    assert len(keys) > 25
    for key in keys:
        for value in ABSURD:
            changed = json.loads(json.dumps(config))
            section = changed
            for part in key[:-1]:
                section = section[part]
            section[key[-1]] = value
            file.write_text(json.dumps(changed))
            started = time.monotonic()
            with pytest.raises(UserError, match=key[-1]):
                check_model_folder(theirs / "model", 144)
            assert time.monotonic() - started < 10


@pytest.mark.parametrize("key", ["intermediate_size", "hidden_size", "num_key_value_heads", "embed_dim", "mlp_ratio"])
def test_a_model_that_is_larger_than_its_weights_is_refused(theirs, key):
    """Each number within its range, and yet memory for it would be taken before anything is read."""
    file = theirs / "model" / "config.json"
    config = json.loads(file.read_text())
    section = config["vision_config" if key in ("embed_dim", "mlp_ratio") else "text_config"]
    section[key] = section[key] * 16
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"parameters, but the weights beside it hold|of width"):
        check_model_folder(theirs / "model", 144)


@pytest.mark.parametrize("number", ["-1", str(10**12)])
@pytest.mark.parametrize("option", ["--votes", "--seed", "--kv-cache-gib"])
def test_an_absurd_number_of_the_command_line_is_refused_by_name(theirs, capsys, option, number):
    assert predict.main(["--checkpoint", str(theirs), option, number, "photos"]) == 2
    assert f"{option} is {number}: it must be between" in capsys.readouterr().err


# --- what is written


def test_nothing_is_written_through_a_link_of_theirs(tmp_path):
    ours = tmp_path / "ours"
    ours.write_text("precious")
    (tmp_path / "evaluation.json.tmp").symlink_to(ours)
    (tmp_path / "evaluation.json").symlink_to(ours)
    write_text(tmp_path / "evaluation.json", "{}")
    assert ours.read_text() == "precious"
    assert (tmp_path / "evaluation.json").read_text() == "{}"


def test_an_evaluation_is_not_written_into_a_folder_that_theirs_links_to(theirs, tmp_path, capsys):
    text = render_template("think_answer", "flower", ["rose", "tulip"])
    card = {**CARD, "prompt": text, "prompt_sha256": text_hash(text)}
    (theirs / "model" / CARD_FILE).write_text(json.dumps(card))
    for number, label in enumerate(("rose", "tulip")):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (60, 60), (90 * number, 30 * i, 0)).save(tmp_path / "photos" / label / f"{i}.png")
    (tmp_path / "ours").mkdir()
    (theirs / "evaluation-test").symlink_to(tmp_path / "ours")
    few = ["data.shots=1", "data.validation=1", "data.test=2"]
    assert evaluate.main(["--checkpoint", str(theirs), *few]) == 2
    assert "evaluation-test is a link to" in capsys.readouterr().err
    assert not list((tmp_path / "ours").iterdir())


# --- compare


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "predictions: "),
        ([1], "predictions.0: "),
        ([{}], "predictions.0.id: "),
        ([{"id": 1, "label": "x", "strict": True, "voted": "x"}], "predictions.0.id: "),
        ([{"id": "a", "label": "x", "strict": 1, "voted": "x"}], "predictions.0.strict: "),
        ([{"id": "a", "label": ["x"], "strict": True, "voted": None}], "predictions.0.label: "),
    ],
)
def test_an_evaluation_of_others_is_data(tmp_path, capsys, rows, message):
    (tmp_path / "evaluation.json").write_text(json.dumps({"predictions": rows}))
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
