"""A model on the hub: in the cache or not, reachable or not, there or not. The hub is a server of this test."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from rft_cluster.common.errors import Unavailable, UserError
from rft_cluster.model.hub import check_files, fetch_weights, find_model
from rft_cluster.prompts import Question

COMMIT = "0123456789012345678901234567890123456789"
NAME = "owner/small-qwen"


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as `owner/small-qwen`; what it was asked for is in `asked`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.status, self.asked = folder, 200, list[str]()
        self.code = ""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if self.server.status != 200 or NAME not in path:
            self.reply(self.server.status if NAME in path else 401, b"", {"X-Error-Code": self.server.code})
        elif path.startswith("/api/models/") and "/tree/" in path:
            self.reply(200, json.dumps([{"type": "file", "oid": "0", **row} for row in self.rows("path")]).encode())
        elif path.startswith("/api/models/"):
            info = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": self.rows("rfilename"), "tags": []}
            self.reply(200, json.dumps(info).encode())
        else:
            data = (self.server.folder / path.rpartition("/")[2]).read_bytes()
            self.reply(200, data, {"ETag": f'"{len(data)}"', "X-Repo-Commit": COMMIT})

    def rows(self, key: str) -> list[dict[str, object]]:
        return [{key: file.name, "size": file.stat().st_size} for file in sorted(self.server.folder.iterdir())]

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import torch

    from rft_cluster.model.tiny.build import untrained

    path = tmp_path_factory.mktemp("model")
    processor, model = untrained(40, ["rose", "tulip"], Question("What is it?"), 56 * 56)
    model.to(torch.bfloat16).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> Iterator[Hub]:
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        find_model(path)
    assert str(caught.value).startswith("model.path: ")
    return str(caught.value)


def test_what_is_not_in_the_cache_is_announced_then_fetched_then_found(hub, folder):
    model = find_model(NAME)
    assert model.missing == (folder / "model.safetensors").stat().st_size
    assert "not in the local cache: 2 MB will be downloaded" in model.note
    assert not list(model.folder.glob("*.safetensors")), "a dry-run fetches no weights"
    assert check_files(model, 1024) == pytest.approx(check_files(find_model(str(folder)), 1024), rel=0.01)
    whole = fetch_weights(NAME)
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    hub.asked.clear()
    model = find_model(NAME)
    assert (model.missing, model.folder) == (0, whole)
    assert "whole in the local cache" in model.note
    assert not hub.asked, "what is whole here is not asked for"


def test_a_model_in_the_cache_needs_no_hub(hub, monkeypatch):
    fetch_weights(NAME)
    hub.status = 503
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(NAME).missing == 0


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_cache_that_lacks_a_file_is_completed(hub, file):
    (fetch_weights(NAME) / file).unlink()
    find_model(NAME)
    assert (fetch_weights(NAME) / file).exists()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "the hub has no such model or does not show it to you"),
        (401, "", "the hub has no such model or does not show it to you"),
        (403, "GatedRepo", "only for those whom its owner lets in"),
        (403, "", "the hub refuses"),
        (400, "", "the hub refuses"),
        (451, "", "the hub refuses"),
        (429, "", "the hub refuses"),
        (500, "", "the hub refuses"),
    ],
)
def test_what_the_hub_refuses(hub, status, code, message):
    hub.status, hub.code = status, code
    with pytest.raises(UserError) as caught:
        find_model(NAME)
    assert message in str(caught.value)
    assert isinstance(caught.value, Unavailable) == (status in {429, 500}), "a scheduler may try again"


@pytest.mark.parametrize("name", ["owner/smal-qwen", "nobody/nothing"])
def test_a_name_that_the_hub_does_not_have(hub, name):
    assert "the hub has no such model" in refusal(name)


@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_the_way_out_is_said_and_works(hub, folder, monkeypatch, tmp_path, offline):
    endpoint = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError) as caught:
        find_model(NAME)
    message = str(caught.value)
    assert isinstance(caught.value, Unavailable) != offline
    assert "and the hub cannot be reached (" in message
    assert ("HF_HUB_OFFLINE is set" in message) == offline
    command = next(line for line in message.splitlines() if line.startswith("  hf download")).split()
    hf = shutil.which("hf", path=Path(sys.executable).parent)
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    subprocess.run([hf, *command[1:]], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert check_files(find_model(str(tmp_path / command[-1])), 1024) > 10**6


@pytest.mark.parametrize(
    "path", ["mm", "Qwen2-VL-2B", "./mm", "../mm", "/no/such/mm", "a b/c", "a/b/c", "mm/", "-m/x", ""]
)
def test_what_is_neither_a_folder_nor_a_name_is_not_asked_for(hub, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert f"there is no folder {path}" in refusal(path)
    assert not hub.asked


@pytest.mark.parametrize("right", ["qwen", "models/qwen", "./qwen"])
@pytest.mark.parametrize("slip", [lambda text: text + "n", lambda text: text.replace("wen", "wn"), str.upper])
def test_a_mistyped_folder_is_told_its_neighbour(hub, folder, tmp_path, monkeypatch, right, slip):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / right)
    head, slash, tail = right.rpartition("/")
    assert f"Did you mean {right.removeprefix('./')}?" in refusal(head + slash + slip(tail))


def test_a_file_is_no_model(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file; it must be a model's folder" in refusal(str(tmp_path / "model.safetensors"))


def test_a_cache_that_cannot_be_written_or_is_full(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be written .*Set HF_HOME"):
        find_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(
        UserError, match=f"the weights of {NAME} need 2 MB .*but 1 MB are free there. Free some. Set HF_HOME"
    ):
        find_model(NAME)
