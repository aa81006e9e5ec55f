"""A run folder of somebody else's is data: nothing of it runs, connects or reads elsewhere unless it is typed."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_text import fields, kinds

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config, load_run_config, run_folder_of
from rft_cluster.config.foreign import CAUTIONS, EXPORTS, HONOURED, RECORDS

SAFE: dict[str, dict[str, Any]] = {
    "run": {"name": "theirs", "folder": "/etc"},
    "model": {"path": "tiny"},
    "data": {"source": "folder", "path": "photos"},
    "schedule": {"steps": 4, "prompts_per_step": 2},
    "cluster": {"device": "cpu"},
}
CANARY = "open('canary', 'w').close()\ndef steal(*_): return 1.0\n"
HOSTILE = {
    "run.sinks": ["canary:steal"],
    "algorithm.total": "canary:steal",
    "algorithm.advantage": "canary:steal",
    "algorithm.normaliser": "canary.steal",
    "model.trust_remote_code": True,
    "data.source": "canary:steal",
    "data.held_out": "/etc",
    "data.manifest": "../secret.json",
    "evaluation.also.source": "canary:steal",
    "evaluation.also.held_out": "/etc",
    "evaluation.also.manifest": "../secret.json",
    "prompt.template": "../secret.txt",
    "evaluation.encoder": "/somewhere/else",
    "cluster.address": "203.0.113.7:6379",
    "cluster.interface": "eth0",
    "tracking": ["tensorboard", "wandb"],
    "rewards.canary:steal": 0.5,
}
TEMPLATES = ["../secret.txt", "/etc/passwd", "./think_answer", "prompts/../../x.txt", "secret", "think_answer.txt", ""]


def with_key(key: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = {name: dict(section) for name, section in SAFE.items()}
    if key.startswith("evaluation.also."):
        config["evaluation"] = {"also": dict(SAFE["data"])}
    *above, name = parts_of(key)
    section = config
    for part in above:
        section = section.setdefault(part, {})
    section[name] = value
    if name == "held_out":
        section["source"] = "huggingface"
    return config


def parts_of(key: str) -> list[str]:
    """The name of a reward is one part, even with dots in it."""
    return key.split(".", 1) if key.startswith("rewards.") else key.split(".")


def run_with(folder: Path, config: dict[str, Any], mark: str = "manifest.json") -> Path:
    """Somebody's run, as it is unpacked: its config.yaml, one record beside it, and a module of theirs."""
    (folder / mark).parent.mkdir(parents=True, exist_ok=True)
    (folder / mark).write_text("{}") if "." in mark else (folder / mark).mkdir()
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "canary.py").write_text(CANARY)
    return folder / "config.yaml"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "canary").exists(), "code of theirs ran"


def test_every_path_is_thought_of():
    paths = {".".join(key) for key, annotation in fields() if Path in kinds(annotation)}
    assert paths - {"run.folder"} <= {*CAUTIONS, *HONOURED}
    assert set(HOSTILE) - {"rewards.canary:steal"} == set(CAUTIONS)


@pytest.mark.parametrize("key", HOSTILE)
def test_what_a_run_says_alone_is_refused_and_the_cure_works(tmp_path, key):
    file = run_with(tmp_path / "runs" / "theirs", with_key(key, HOSTILE[key]))
    with pytest.raises(UserError) as caught:
        load_config(str(file), [])
    message = str(caught.value)
    assert f"{file} lies in a run's folder" in message and key in message
    line = message.splitlines()[-1]
    (said,) = shlex.split(line.split("  ")[1])
    value: Any = load_config(str(file), [said])
    for part in parts_of(key):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == (Path(HOSTILE[key]) if isinstance(value, Path) else HOSTILE[key])
    if without := re.search(r"; without it: (\S+)$", line):
        assert load_config(str(file), [without.group(1)])


def test_all_keys_are_named_at_once(tmp_path):
    config = with_key("data.manifest", "/x")
    config["rewards"] = {"a.b:c": 1, "accuracy": 1}
    config["cluster"]["address"] = "\x1b[2J\nevil:1"
    with pytest.raises(UserError) as caught:
        load_config(str(run_with(tmp_path / "theirs", config)), [])
    message = str(caught.value)
    assert all(key in message for key in ("data.manifest", "cluster.address", "rewards.a.b:c"))
    assert "\x1b" not in message and len(message.splitlines()) == 4


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_one_of_the_packages_or_typed(tmp_path, template):
    file = run_with(tmp_path / "theirs", with_key("prompt.template", template))
    with pytest.raises(UserError, match=r"prompt\.template"):
        load_config(str(file), [])


@pytest.mark.parametrize("mark", [*RECORDS, *EXPORTS])
@pytest.mark.parametrize("way", ["named", "link", "link to the folder", "within", "bare name"])
def test_however_the_file_is_named_it_lies_in_the_run(tmp_path, monkeypatch, mark, way):
    folder = tmp_path / "their runs #1" / "theirs"
    file = run_with(folder, with_key("model.trust_remote_code", True), mark)
    if way == "link":
        (tmp_path / "mine.yaml").symlink_to(file)
        file = tmp_path / "mine.yaml"
    elif way == "link to the folder":
        (tmp_path / "elsewhere").symlink_to(folder)
        file = tmp_path / "elsewhere" / "config.yaml"
    elif way == "within":
        (folder / "a" / "b").mkdir(parents=True)
        file = file.rename(folder / "a" / "b" / "other.yaml")
        (folder / "config.yaml").write_text("")
    elif way == "bare name":
        monkeypatch.chdir(folder)
        file = Path(file.rename(folder / "digits.yaml").stem)
        (folder / "config.yaml").write_text("")
    with pytest.raises(UserError, match="lies in a run's folder"):
        load_config(str(file), [])


def test_a_configuration_of_ones_own_is_the_callers_word(tmp_path):
    """Also beside runs, checkpoints of others, or with the name config.yaml."""
    run_with(tmp_path / "runs" / "theirs", SAFE)
    (tmp_path / "checkpoints").mkdir()
    for name in ("mine.yaml", "runs/mine.yaml"):
        config = {**with_key("model.trust_remote_code", True), "rewards": {"my:own": 1}}
        (tmp_path / name).write_text(json.dumps(config))
        assert run_folder_of(Path(name)) is None
        assert load_config(name, []).model.trust_remote_code
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text((tmp_path / "mine.yaml").read_text())
    assert load_config("alone/config.yaml", []).rewards == {"my:own": 1.0}


@pytest.mark.parametrize("folder", ["runs/theirs", "my #1/[2024] run: new", "a/b/~c"])
def test_a_run_writes_to_where_it_lies_and_finds_its_data(tmp_path, monkeypatch, folder):
    """Not to where it says (here /etc); data are found beside it from any working folder."""
    config = with_key("run.folder", "runs")
    file = run_with(tmp_path / folder, config)
    assert load_config(str(file), []).run_folder == Path(folder)
    assert load_config(str(file), ["run.name=again"]).run_folder == Path(folder).parent / "again"
    assert load_config(str(file), ["run.folder=out"]).run_folder == Path("out") / Path(folder).name
    photos = (tmp_path / folder).parent.parent / "photos"
    photos.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_config(str(file), [])
    assert (found.data.path, found.run_folder) == (photos, tmp_path / folder)
    table = load_config(str(file), ["data.source=csv", "data.path=labels.csv", "data.images=photos"]).data
    assert (table.path, table.images) == (Path("labels.csv"), Path("photos"))  # as they were typed
    file.write_text(json.dumps({**config, "data": {"source": "csv", "path": "none.csv", "images": "photos"}}))
    table = load_config(str(file), []).data
    assert (table.path, table.images) == (Path("none.csv"), photos)
    also = {"source": "csv", "path": "none.csv", "images": "photos"}
    file.write_text(json.dumps({**config, "evaluation": {"also": also}}))
    found = load_config(str(file), [])
    assert found.evaluation.also is not None and found.data.path == photos
    assert (found.evaluation.also.path, found.evaluation.also.images) == (Path("none.csv"), photos)
    typed = load_config(str(file), ["evaluation.also.images=photos"]).evaluation.also
    assert typed is not None and typed.images == Path("photos")  # as it was typed
    with pytest.raises(UserError, match=r"run\.name"):
        load_config(str(file), ["run.name=../x"])


def test_what_a_command_does_not_use_is_not_asked_about(tmp_path):
    file = run_with(tmp_path / "theirs", {**with_key("data.manifest", "/x"), "rewards": {"canary:steal": 1}})
    config = load_run_config(tmp_path / "theirs", file, [], without=("rewards", "data.manifest"))
    assert config == Config.model_validate({**SAFE, "run": {"name": "theirs", "folder": tmp_path}})
