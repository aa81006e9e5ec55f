"""The output before anything starts: one clear message or the plan, and no files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from rft_cluster import launch
from rft_cluster.common import stopping
from rft_cluster.config import load_config
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.run.folder import write_record
from rft_cluster.run.lock import locked

PIXELS = 56 * 56
FEW = ("data.source=folder", "data.shots=2", "data.validation=1", "data.test=2")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Keep these tests away from any Ray cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """A tiny Qwen2-VL that was never trained."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_processor(["rose", "tulip"], ["group-00", "kind-000"], "Which class of digit?", PIXELS)
    build_model(processor.tokenizer).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def photos(root: Path, **counts: int) -> Path:
    """A sub-folder of different pictures for each class."""
    for number, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((8, 8, 3), 20 * number + i, dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Overrides for a data set that is read in no time."""
    path = photos(tmp_path_factory.mktemp("data") / "photos", rose=8, tulip=8)
    return [*FEW, f"data.path={path}"]


def run(tmp_path: Path, capsys, *arguments: str, config: str = "digits") -> tuple[int, str, str]:
    """The exit code, what was printed, and the error."""
    code = launch.main(["--config", config, f"run.folder={tmp_path / 'runs'}", "run.name=mine", *arguments])
    printed = capsys.readouterr()
    assert not (tmp_path / "runs").exists(), "a run folder was left"
    return code, printed.out, printed.err


def refusal(tmp_path: Path, capsys, *arguments: str, config: str = "digits") -> str:
    code, _, error = run(tmp_path, capsys, *arguments, config=config)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("error:") == 1
    assert "Traceback" not in error
    return error


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule.stpes=3"], "schedule.stpes: unknown key; did you mean schedule.steps?"),
        (["schedule.steps=0"], "schedule.steps: Input should be greater than or equal to 1, got 0"),
        (["steps=3"], "override 'steps=3' must look like section.key=value"),
        (["rewards.acuracy=1"], "rewards: 'acuracy' is unknown. Did you mean accuracy?"),
        (["algorithm.advantage=rlo"], "algorithm.advantage: 'rlo' is unknown. Did you mean rloo?"),
        (["algorithm.normaliser=os:getcwd"], "algorithm.normaliser: 'os:getcwd' cannot be called as norm"),
        (["run.sinks=[os.getcwd]"], "run.sinks: 'os.getcwd' cannot be called as sink(stats)"),
        (["run.sinks=[console]"], "run.sinks: 'console': a function of your own is given as package.module:function"),
        (
            ["rewards.my.py:f=1"],
            "rewards: 'my.py:f' names a file: name the module, as in an import. Did you mean my:f?",
        ),
        (["prompt.template=think_anser"], "'think_anser' is neither a file nor one of"),
        (["data.source=digit"], "data.source: 'digit' is unknown. Did you mean digits?"),
        (["data.validation=3", "data.test=15"], "(3) and data.test (15) ask for 18 images, but 12 are left"),
    ],
)
def test_a_mistake_in_the_configuration(tmp_path, capsys, small, arguments, message):
    assert message in refusal(tmp_path, capsys, *small, *arguments)


def test_an_unknown_config(tmp_path, capsys):
    assert "config 'digitz' is neither a file" in refusal(tmp_path, capsys, config="digitz")


def test_a_data_folder_that_does_not_exist(tmp_path, capsys):
    path = tmp_path / "photoes"
    assert f"data.path: {path} does not exist" in refusal(tmp_path, capsys, *FEW, f"data.path={path}")
    assert "data.path is missing" in refusal(tmp_path, capsys, *FEW)


def test_an_image_that_cannot_be_read(tmp_path, capsys):
    path = photos(tmp_path / "photos", rose=5, tulip=5)
    (path / "rose" / "broken.jpg").write_bytes(b"not a picture")
    error = refusal(tmp_path, capsys, *FEW, f"data.path={path}")
    assert "rose/broken.jpg: not an image in one of the formats" in error
    assert "1 of the 11 image files" in error


def test_a_label_that_is_not_in_the_set(tmp_path, capsys):
    path = photos(tmp_path / "photos", rose=5, tulip=5)
    error = refusal(tmp_path, capsys, *FEW, f"data.path={path}", "data.classes=[rose,daisy]")
    assert "'tulip' has images but is not in data.classes" in error
    assert "'daisy' is in data.classes but has no images" in error


def test_too_few_images_for_the_shots(tmp_path, capsys):
    path = photos(tmp_path / "photos", rose=5, tulip=1)
    error = refusal(tmp_path, capsys, *FEW, f"data.path={path}")
    assert "data.shots is 2, but these classes have fewer different images" in error
    assert "'tulip': 1" in error


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_model_folder_that_is_not_a_qwen2_vl(tmp_path, capsys, small, dry_run):
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    message = "is a 'llama', which is not supported: take Qwen2-VL ('qwen2_vl')"
    assert message in refusal(tmp_path, capsys, *small, f"model.path={other}", *dry_run)
    missing = tmp_path / "nowhere"
    assert f"there is no folder {missing}" in refusal(tmp_path, capsys, *small, f"model.path={missing}", *dry_run)


def test_a_prompt_that_is_longer_than_allowed(tmp_path, capsys, small, model_folder):
    error = refusal(tmp_path, capsys, *small, f"model.path={model_folder}", "model.max_prompt_tokens=20")
    assert "the prompt of rose/" in error
    assert "(4 of the image, " in error
    assert "more than model.max_prompt_tokens = 20" in error


def test_a_sequence_that_is_longer_than_the_window(tmp_path, capsys, small, model_folder):
    error = refusal(tmp_path, capsys, *small, f"model.path={model_folder}", "model.max_prompt_tokens=2040")
    # 2040 + 16 completion tokens
    assert "model.max_prompt_tokens + sampling.max_tokens = 2056 is more than the window" in error
    assert "2048 tokens" in error


def test_a_run_that_exists_is_not_begun_again(tmp_path, capsys, small):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    code = launch.main(["--config", "digits", f"run.folder={tmp_path / 'runs'}", "run.name=mine", *small])
    assert code == 2
    assert "exists: add --resume" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_resume_needs_a_run_and_auto_does_not(tmp_path, capsys, small):
    arguments = ["--config", "digits", f"run.folder={tmp_path / 'runs'}", "run.name=mine", *small, "--dry-run"]
    assert launch.main([*arguments, "--resume"]) == 2
    assert "there is no run in" in capsys.readouterr().err
    assert launch.main([*arguments, "--resume=auto", "learners.count=3"]) == 0
    assert "3 learners" in capsys.readouterr().out


def test_a_run_that_another_process_is_running_is_left_alone(tmp_path, capsys, small):
    run = tmp_path / "runs" / "mine"
    with locked(run):
        code = launch.main(["--config", "digits", f"run.folder={tmp_path / 'runs'}", "run.name=mine", *small])
        assert code == 2
        assert f"{run}: another process is running it (pid {os.getpid()} on " in capsys.readouterr().err
        assert launch.main(["--config", "digits", f"run.folder={tmp_path / 'runs'}", "run.name=mine", *small,
                            "--dry-run"]) == 0  # fmt: skip
        assert f"note: {run}: another process is running it" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [[], ["run.seed=1"]])
def test_a_dry_run_beside_a_run_of_that_name_notes_it(tmp_path, capsys, small, changed):
    run = tmp_path / "runs" / "mine"
    arguments = ["--config", "digits", f"run.folder={tmp_path / 'runs'}", "run.name=mine", *small]
    run.mkdir(parents=True)
    write_record(run, load_config("digits", arguments[2:]))
    assert launch.main([*arguments, *changed, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"note: {run} " in said
    assert ("was started with another configuration" if changed else "holds a run: add --resume") in said
    assert launch.main([*arguments, *changed, "--dry-run", "--resume"]) == (2 if changed else 0)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml"]


# --- the dry run


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path, capsys):
    code, printed, error = run(tmp_path, capsys, "--dry-run", "generators.count=3")
    assert (code, error) == (0, "")
    for text in (
        "digits: 10 classes, 40 images to learn from, 200 for validation, 500 for the test",
        *("2 learners", "3 generators", "1 reward", "placement"),
        "20 prompts x 8 completions = 160 completions, 80 a learner",
        "80 steps; an epoch of 40 images is 2 steps",
    ):
        assert text in printed


def test_the_grace_of_the_place_is_used(tmp_path, capsys, monkeypatch):
    for name in ("WHOLE", "PATIENCE"):  # as they are now, afterwards, too
        monkeypatch.setattr(stopping, name, getattr(stopping, name))
    assert run(tmp_path, capsys, "--dry-run", "cluster.grace_seconds=30")[0] == 0
    assert (stopping.WHOLE, stopping.PATIENCE) == (10, 60)
    assert run(tmp_path, capsys, "--dry-run", "cluster.grace_seconds=540")[0] == 0
    assert (stopping.WHOLE, stopping.PATIENCE) == (180, 540)


def test_a_dry_run_does_not_read_the_options_of_another_run(tmp_path, capsys):
    own = ["prompt.template=closed", "prompt.options=own_top_k"]
    folder = tmp_path / "runs" / "mine"
    arguments = ["--config", "digits", f"run.folder={tmp_path / 'runs'}", "run.name=mine", *own]
    folder.mkdir(parents=True)
    write_record(folder, load_config("digits", arguments[2:]))
    (folder / "options.json").write_text("{}")
    assert launch.main([*arguments, "run.seed=1", "--dry-run"]) == 0
    assert "was started with another configuration" in capsys.readouterr().out


def test_options_and_overrides_may_come_in_any_order(tmp_path, capsys, small):
    code = launch.main([*small, "--dry-run", f"run.folder={tmp_path}", "--config", "digits", "run.name=mine"])
    assert code == 0
    assert "2 classes, 4 images to learn from" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# --- can anything be earned?


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("question", "message"),
    [
        (r"Which {{ subject }}? Put the final answer in \boxed{}.", r"shows no <answer> tag, but \boxed{}, and"),
        ("Which {{ subject }}? <ANSWER></ANSWER>", "shows no <answer> tag, but <ANSWER> </ANSWER>, and"),
        ("Which {subject}? <answer> </answer>", "holds {subject}, which is text here"),
        ("<image>Which {{ subject }}? <answer> </answer>", "holds <image>, which is text here"),
    ],
)
def test_a_question_that_earns_nothing_is_refused(tmp_path, capsys, small, question, message, dry):
    (tmp_path / "q.txt").write_text(question)
    more = ["--dry-run"] if dry else []
    code, _, error = run(tmp_path, capsys, *small, f"prompt.template={tmp_path / 'q.txt'}", *more)
    assert code == 2 and message in error


@pytest.mark.parametrize("tokens", [1, 3, 5])
@pytest.mark.parametrize("dry", [True, False])
def test_no_room_for_any_answer_is_refused_and_the_cure_works(tmp_path, capsys, small, tokens, dry):
    limit, more = f"sampling.max_tokens={tokens}", ["--dry-run"] if dry else []
    code, _, error = run(tmp_path, capsys, *small, limit, *more)
    assert code == 2 and "<think></think><answer>rose</answer>, has 6 tokens with the stop token" in error
    cure = error.split("Set sampling.max_tokens to ")[1].split()[0]
    assert run(tmp_path, capsys, *small, f"sampling.max_tokens={cure}", "--dry-run")[0] == 0
    code, printed, _ = run(tmp_path, capsys, *small, limit, "scoring.red_team=warn", "--dry-run")
    assert code == 0 and "has 6 tokens" in printed


# --- whatever a launch would refuse, a dry run refuses, with the same words


BOTH = pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry run"])
GPUS = ("cluster.device=cuda", "generators.gpus=1", "learners.gpus=1")


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.path=mm"], "model.path: there is no folder mm (a model on the hub has a name of the form owner/name)"),
        (["model.path=owner/none"], "model.path: owner/none is no folder here and not in the local cache"),
        (["prompt.template=nowhere.txt"], "prompt.template: 'nowhere.txt' is neither a file nor"),
        (["data.manifest=nowhere.json"], "data.manifest: nowhere.json cannot be read"),
        (["rewards.nowhere:f=1"], "rewards: 'nowhere:f' cannot be found"),
        (["data.validation=2", "data.test=3"], "model.path is tiny: it learns to see from images outside validation"),
        (["sampling.max_tokens=2000"], "is more than the window of the small model, 2048 tokens"),
        (["model.max_prompt_tokens=20"], "more than model.max_prompt_tokens = 20"),
        ([*GPUS], "the run needs 3 GPUs, the cluster has 0"),
        (["generators.kv_cache_gib=16384"], "lower generators.count, generators.kv_cache_gib"),
        (["schedule.keep_checkpoints=100000000"], "lower schedule.keep_checkpoints, or set run.folder"),
        (["run.folder=/proc/sys"], "/proc/sys/mine cannot be written"),
        (["evaluation.encoder=enc"], "evaluation.encoder is enc, but nothing in this run reads it: add encoder"),
        (["scoring.red_team=off", "sampling.max_tokens=5", "baselines=[sft]"], "the answer that SFT is to teach in"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, capsys, small, monkeypatch, dry_run, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("rft_cluster.run.task.TINY_CACHE", tmp_path / "cache")
    assert message in refusal(tmp_path, capsys, *small, *arguments, *dry_run)
    assert not (tmp_path / "cache").exists(), "the small model was built"


@BOTH
@pytest.mark.parametrize("labels", [("<5mm", ">5mm"), ("a<b", "b"), ("x\ny", "z")], ids=repr)
def test_a_class_that_cannot_be_one_token_of_the_small_model(tmp_path, capsys, dry_run, labels):
    path = photos(tmp_path / "photos", **dict.fromkeys(labels, 8))
    error = refusal(tmp_path, capsys, *FEW, f"data.path={path}", *dry_run)
    assert "set model.path to a trained Qwen2-VL" in error or "control character" in error


@BOTH
@pytest.mark.parametrize("kind", ["file", "link to nothing", "fifo"])
@pytest.mark.parametrize("where", ["runs", "runs/mine"])
def test_something_that_is_no_folder_lies_where_the_run_goes(tmp_path, capsys, small, dry_run, kind, where):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    make = {"file": path.touch, "link to nothing": lambda: path.symlink_to("gone"), "fifo": lambda: os.mkfifo(path)}
    make[kind]()
    code = launch.main(["--config", "digits", f"run.folder={tmp_path / 'runs'}", "run.name=mine", *small, *dry_run])
    error = capsys.readouterr().err
    assert (code, error.count("error: ")) == (2, 1)
    assert f"{tmp_path / 'runs' / 'mine'} cannot be written" in error


@BOTH
@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_is_too_long_for_ray(tmp_path, capsys, small, monkeypatch, dry_run, name):
    monkeypatch.setenv(name, "/tmp/" + "x" * 82)
    assert "export RAY_TMPDIR=/tmp" in refusal(tmp_path, capsys, *small, *dry_run)


@BOTH
@pytest.mark.parametrize("home", ["nowhere", "/proc/sys"])
def test_a_home_that_is_none(tmp_path, capsys, small, monkeypatch, dry_run, home):
    """`~` stays `~` for a container's user without a name."""
    monkeypatch.setenv("HOME", home)
    message = "export HOME=FOLDER" if home == "nowhere" else "set HOME to a folder that can be"
    assert message in refusal(tmp_path, capsys, *small, *dry_run)


@BOTH
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
def test_a_damaged_model_folder(tmp_path, capsys, small, model_folder, dry_run, file, damage):
    path = shutil.copytree(model_folder, tmp_path / "model")
    (path / file).write_bytes(damage)
    assert refusal(tmp_path, capsys, *small, f"model.path={path}", *dry_run).startswith("error: model.path: ")


def test_a_dry_run_says_what_the_run_takes(tmp_path, capsys, small):
    code, printed, _ = run(tmp_path, capsys, *small, "--dry-run", "learners.cpus=100")
    assert code == 0
    for text in (
        "tokens at most, of 128",
        "for checkpoints, models and journal in",
        "note: the plan counts",
        "the small model learns to see from",
        "the run would start Ray on this machine, which can hold it",
    ):
        assert text in printed


HEAVY = {"torch", "transformers", "vllm", "ray", "sklearn", "scipy", "peft", "datasets", "matplotlib"}
SLIPS = [
    ["launch", "--config", "digitz"],
    ["launch", "--config", "digits", "data.source=folder", "data.path=nowhere"],
    ["launch", "--config", "digits", "schedule.stpes=3"],
    ["launch", "--config", "digits", "model.path=nowhere", "--dry-run"],
    ["launch", "--config", "digits", "prompt.template=nowhere"],
    ["launch", "--config", "digits", "run.folder=/proc/sys"],
    ["launch", "--config", "digits", "data.manifest=nowhere"],
    ["launch", "--config", "digits", "rewards.nowhere:f=1"],
    ["launch", "--config", "digits", "algorithm.advantage=grop"],
    ["launch", "--config", "digits", "run.sinks=[nowhere:f]"],
    ["evaluate", "--checkpoint", "nowhere"],
    ["evaluate", "--checkpoint", "base", "--config", "digitz"],
    ["evaluate", "--checkpoint", "base", "--config", "digits", "data.source=folder", "data.path=nowhere"],
    ["evaluate", "--checkpoint", "base", "--config", "digits", "model.path=nowhere"],
    ["evaluate", "--checkpoint", "base", "--config", "digits", "--output", "/proc/sys/x"],
    ["predict", "--checkpoint", "nowhere", "x.jpg"],
    ["predict", "--checkpoint", ".", "x.jpg"],
    ["compare", "nowhere", "nowhere"],
    ["sweep", "--config", "nowhere.yaml"],
]
# One after the other in one interpreter: of each its exit code, its error, what it imported and what it left.
TELL = """
import contextlib, importlib, io, json, os, sys
told = []
for command, *rest in json.loads(sys.argv[1]):
    error, before = io.StringIO(), set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = importlib.import_module(f"rft_cluster.{command}").main(rest)
    told.append([code, error.getvalue(), sorted(set(sys.modules) - before), os.listdir()])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[list]:
    words = [sys.executable, "-c", TELL, json.dumps(SLIPS)]
    folder = tmp_path_factory.mktemp("slips")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("slip", SLIPS, ids=" ".join)
def test_a_slip_is_told_before_anything_heavy_is_imported(told, slip):
    """Seconds pass while torch is imported: a mistyped name is not worth them."""
    code, error, imported, left = told[SLIPS.index(slip)]
    assert code == 2 and error.startswith("error: ")
    assert not HEAVY & set(imported)
    assert not left
