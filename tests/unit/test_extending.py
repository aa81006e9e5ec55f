"""The examples of docs/extending.md, run as they stand on the page."""

import asyncio
import io
import json
import os
import re
import runpy
import shlex
import socket
import sqlite3
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from some_prompt import some_prompt

from rft_cluster import launch
from rft_cluster.config import ScoringSection, load_config
from rft_cluster.data.images import image_sha256
from rft_cluster.messages import Completion, Group
from rft_cluster.model.families.family import Family
from rft_cluster.prompts import render_template
from rft_cluster.rewards.scorer import Scorer
from rft_cluster.run.folder import RunFolder
from rft_cluster.train import train
from tests.unit.run.begun import TASK, config
from tests.unit.run.steps import ADVANTAGES, GROUPS, LEARNER, REWARDS, stats
from tests.unit.test_train import SETTINGS, Roles
from tests.unit.test_train import TASK as TRAINED

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
FILES = {name: code for name, code in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL)}
FILES |= {name: text for name, text in re.findall(r"```text\n(\S+\.txt)\n(.*?)```", PAGE, re.DOTALL)}


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """A folder with the page's files, to work in and to import from."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


LAUNCHES = re.findall(r"^python -m rft_cluster.launch --config (\S+) ([^#&\n]*)", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("name", "arguments"), LAUNCHES)
def test_the_commands_on_the_page_have_keys_that_there_are(name, arguments):
    load_config(name, [word for word in shlex.split(arguments) if not word.startswith("--")])


def test_the_page_has_what_is_tested():
    assert len(FILES) == 6 and len(LAUNCHES) == 6


def test_the_page_tells_what_a_family_of_models_says():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == {field.name for field in fields(Family)}
    tests = re.findall(r"tests/\S+\.py", PAGE)
    assert len(tests) == 4 and all((Path(__file__).parents[2] / test).is_file() for test in tests)


# --- a reward that asks a judge

TAKES, AT_ONCE = 0.5, 16  # seconds of the judge for an answer; calls at once


class Judge(ThreadingHTTPServer):
    """Takes its time, and finds an answer right that names the label. Over the loopback interface."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Judging)
        self.lock = threading.Lock()
        self.running = self.most = self.asked = 0


class _Judging(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        judge = self.server
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.asked += 1
            judge.running += 1
            judge.most = max(judge.most, judge.running)
        time.sleep(TAKES)
        with judge.lock:
            judge.running -= 1
        allowed = self.headers["Authorization"] == "Bearer sesame" and "broken" not in question["answer"]
        self.send_response(200 if allowed else 503)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"score": float(question["label"] in question["answer"])}).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def judge(monkeypatch) -> Iterator[Judge]:
    with Judge() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/score")
        monkeypatch.setenv("JUDGE_KEY", "sesame")
        yield server
        server.shutdown()


IMAGES = {image_sha256(b"an image"): b"an image"}


def chunk(number: int, *texts: str) -> list[Group]:
    """A part of a step, as one generator's call brings it: one group."""
    prompt = some_prompt(f"train/0/{number}", f"photos/{number}.png")
    return [Group(prompt, [1], [Completion([1], [-0.1], text, "stop", 0) for text in texts])]


def test_a_step_keeps_the_judge_busy_up_to_the_limit(written, judge):
    async def score_step() -> tuple[list, float]:
        await scorer.score(chunk(0, "rose"))  # it has been imported
        start = time.monotonic()
        chunks = [chunk(number, "a rose", *["a tulip"] * 7) for number in range(8)]
        scored = await asyncio.gather(*(scorer.score(one, 64) for one in chunks))
        return scored, time.monotonic() - start

    scorer = Scorer({"my_judge:judge": 1.0}, ScoringSection(max_concurrent=AT_ONCE), IMAGES)
    scored, seconds = asyncio.run(score_step())
    scorer.close()
    assert [[reward.total for reward in rewards] for (rewards,) in scored] == [[1.0, *[0.0] * 7]] * 8
    assert judge.most == AT_ONCE
    # 64 answers, 16 at once: 2 s. One after the other 32 s.
    assert seconds < 64 * TAKES / 3


def test_what_the_judge_refuses_is_masked(written, judge):
    scorer = Scorer({"my_judge:judge": 1.0}, ScoringSection(failure_budget=0.5), IMAGES)
    ((good, bad),) = asyncio.run(scorer.score(chunk(0, "a rose", "broken")))
    scorer.close()
    assert (good.total, bad.total) == (1.0, None)
    assert bad.failures["my_judge:judge"].startswith("aiohttp.client_exceptions.ClientResponseError: 503")
    assert "sesame" not in str(bad.failures)


# --- an advantage and a sink, in the loop


class Recording(Roles):
    """Roles that give the first completion of a group 1 and the second 0, and remember their advantages."""

    def __init__(self) -> None:
        super().__init__(None, 0, 0.0)
        self.advantages: list[float] = []

    def start_update(self, samples, step):
        self.advantages += [sample.advantage for sample in samples]
        return super().start_update(samples, step)


def test_an_advantage_and_a_sink_run_in_the_loop(written, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("METRICS_PORT", str(free.getsockname()[1]))
    own = ("algorithm.advantage=my_advantage:above_median", "run.sinks=[my_metrics:prometheus]")
    settings, roles = config(written, *SETTINGS, *own), Recording()
    train(settings, TRAINED, roles, RunFolder(settings, TRAINED, 0, "nothing"))
    assert roles.advantages == [0.5, -0.5] * 2 * settings.schedule.steps  # GRPO's would be 0.7
    with urllib.request.urlopen(f"http://127.0.0.1:{os.environ['METRICS_PORT']}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    assert {"rft_reward 0.5", "rft_live_groups 1.0", "rft_staleness 0.0"} <= set(lines)


# --- a data source and a question


def test_a_source_and_a_question_pass_a_dry_run(written, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with closing(sqlite3.connect("plants.sqlite")) as database, database:
        database.execute("CREATE TABLE plants (id INTEGER PRIMARY KEY, photo BLOB, species TEXT, checked INTEGER)")
        for number in range(24):
            image = io.BytesIO()
            Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(image, "PNG")
            row = (image.getvalue(), "rose" if number % 2 else "tulip", number < 20)
            database.execute("INSERT INTO plants (photo, species, checked) VALUES (?, ?, ?)", row)
    code = launch.main(
        ["--config", "photos", "data.source=my_database:plants", "data.path=plants.sqlite", "data.shots=2",
         "data.validation=2", "data.test=4", "prompt.subject=plant", "prompt.template=my_question.txt", "--dry-run"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "plants: 2 classes, 4 images to learn from, 2 for validation, 4 for the test" in printed.out
    assert "A botanist asks: which plant is this, of 2?" in render_template("my_question.txt", "plant", ["a", "b"])


# --- a command


def run_as_a_command(name: str, *arguments: str) -> object:
    """Its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(name, run_name="__main__")
    return end.value.code


def test_a_command_reads_a_run(written, capsys):
    run = RunFolder(config(written), TASK)
    run.log_rollouts(1, GROUPS, REWARDS, ADVANTAGES, LEARNER)
    run.log_step(stats())
    capsys.readouterr()
    assert run_as_a_command("my_hardest.py", str(run.path)) == 0
    assert capsys.readouterr().out.splitlines() == ["  0.0 % of 2  digits/1", " 50.0 % of 2  digits/0"]
    assert run_as_a_command("my_hardest.py", "nowhere") == 2
    assert capsys.readouterr().err == "error: nowhere has no rollouts: name the folder of a run\n"
