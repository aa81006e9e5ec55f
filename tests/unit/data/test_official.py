"""The official archive is fetched from a server on loopback that gives a made archive of the same layout."""

import errno
import hashlib
import os
import re
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchvision.datasets import Flowers102

from rft_cluster.common import progress
from rft_cluster.common.errors import Unavailable, UserError
from rft_cluster.config import DataSection, load_config
from rft_cluster.data import load_dataset, official
from rft_cluster.data.archive import HOME, flower_classes
from rft_cluster.data.official import bytes_to_download, official_archive
from rft_cluster.run.planned import archive_is_missing
from tests.unit.data.test_archive import official as official_split
from tests.unit.data.test_archive import write_archive

NAMES = ("102flowers.tgz", "imagelabels.mat", "setid.mat")
WANTED = DataSection(source="flower102", download=True, shots=1, validation=30, test=150)


class Handler(SimpleHTTPRequestHandler):
    """Gives files as they are, unless the server says otherwise."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.silent:
            time.sleep(self.server.silent)
        super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        outputfile.write(source.read()[: self.server.cut_at])

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    silent = 0.0  # seconds before an answer
    cut_at: int | None = None  # bytes after which the connection ends

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder with the three files of a made archive."""
    folder = write_archive(tmp_path_factory.mktemp("home"))
    with tarfile.open(folder / NAMES[0], "w:gz") as tar:
        tar.add(folder / "jpg", "jpg")
    return folder


@pytest.fixture
def home(packed, tmp_path, monkeypatch) -> Path:
    """The files that the server gives, to change. torchvision knows their MD5s, and the cache is empty."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes((packed / name).read_bytes())
    know(folder, monkeypatch)
    monkeypatch.setattr(official, "CACHE", tmp_path / "cache" / "flowers102")
    monkeypatch.setenv("no_proxy", "*")
    return folder


@pytest.fixture
def server(home, monkeypatch):
    with Server(home) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(Flowers102, "_download_url_prefix", f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.shutdown()


def know(folder: Path, monkeypatch) -> None:
    """Let torchvision know the MD5s of these files."""
    files = {part: (name, md5(folder / name)) for part, name in zip(("image", "label", "setid"), NAMES, strict=True)}
    monkeypatch.setattr(Flowers102, "_file_dict", files)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def refusal(kind: type[UserError] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        official_archive()
    assert kind in {None, type(caught.value)}
    assert not official.CACHE.exists(), "half a download has the name of a whole one"
    assert not official.CACHE.with_name("flowers102.tmp").exists(), "half a download was left"
    return str(caught.value)


def test_torchvision_knows_the_archive_that_we_read():
    source = official._source()
    assert source.home == HOME and tuple(source.md5s) == NAMES
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in source.md5s.values())


def test_the_archive_is_fetched_once_and_then_read_from_the_cache(server, home, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(official, "PIECE", 2_000)
    total = sum((home / name).stat().st_size for name in NAMES)
    assert bytes_to_download() == total and not server.asked
    dataset = load_dataset(WANTED, seed=0)
    printed = capsys.readouterr().out
    assert printed.startswith(f"downloading the official Flower102 archive, 0 MB, to {official.CACHE}\n")
    assert re.search(r"\ndownloading 102flowers\.tgz, MB: 1 of \d+, \d:\d\d left\n", printed)
    assert dataset.classes == flower_classes()
    for split, variable, count in (("train", "trnid", 102), ("validation", "valid", 30), ("test", "tstid", 150)):
        ids = [e.example_id for e in dataset.splits[split]]
        assert len(ids) == count and set(ids) <= official_split(home.parent / "cache/flowers102", variable)
    assert sorted(path.name for path in official.CACHE.iterdir()) == ["imagelabels.mat", "jpg", "setid.mat"]
    server.asked.clear()
    assert load_dataset(WANTED, seed=0) == dataset and bytes_to_download() == 0
    assert not server.asked


def test_a_path_is_read_and_nothing_fetched(server, packed):
    dataset = load_dataset(WANTED.model_copy(update={"path": packed}), seed=0)
    assert len(dataset.test) == 150 and not server.asked and not official.CACHE.exists()


def test_without_a_path_or_the_wish_to_download_the_message_names_both(home):
    with pytest.raises(UserError, match=r"data\.path is missing: set it .* or fetch that with data\.download=true"):
        load_dataset(DataSection(source="flower102"), seed=0)
    with pytest.raises(ValueError, match="download is for source huggingface and flower102 only, source is digits"):
        DataSection(source="digits", download=True)


def test_a_server_that_is_down(home, monkeypatch):
    monkeypatch.setattr(Flowers102, "_download_url_prefix", "http://127.0.0.1:9/")
    message = refusal(Unavailable)
    assert message.startswith("data.download: http://127.0.0.1:9/102flowers.tgz cannot be fetched (")
    assert "Connection refused" in message and "set data.path (data.held_out" in message and "\n" not in message


def test_a_server_that_is_silent(server, monkeypatch):
    monkeypatch.setattr(official, "PATIENCE", 0.2)
    server.silent = 0.5
    assert "102flowers.tgz cannot be fetched (timed out)" in refusal()


def test_a_file_that_the_server_does_not_have(server, home):
    (home / "setid.mat").unlink()
    assert "setid.mat cannot be fetched (HTTP Error 404: File not found)" in refusal(UserError)


def test_a_file_with_another_md5(server, home):
    expected = md5(home / "setid.mat")
    (home / "setid.mat").write_bytes(b"other")
    message = refusal()
    assert f"setid.mat was cut or changed on its way: its MD5 is {md5(home / 'setid.mat')}, not {expected}" in message


def test_a_connection_that_ends_half_way(server):
    server.cut_at = 1000
    message = refusal(Unavailable)  # so a scheduler tries again
    assert re.search(r"102flowers\.tgz cannot be fetched \(it ended after 1000 of \d+ bytes\)", message)


def test_a_proxy_that_does_not_say_how_long_a_file_is(server, monkeypatch):
    send = Handler.send_header

    def without_length(handler: Handler, name: str, value: str) -> None:
        if name != "Content-Length":
            send(handler, name, value)

    monkeypatch.setattr(Handler, "send_header", without_length)
    assert (bytes_to_download(), official.size_to_download()) == (0, "files of unknown size")
    config = load_config("flower102", ["data.download=true"])
    assert archive_is_missing(config) and not server.asked
    assert len(load_dataset(WANTED, seed=0).test) == 150
    assert not archive_is_missing(config)


def test_an_archive_that_is_cut_at_the_server(server, home, monkeypatch):
    whole = (home / NAMES[0]).read_bytes()
    (home / NAMES[0]).write_bytes(whole[: len(whole) // 2])
    know(home, monkeypatch)
    assert "102flowers.tgz cannot be unpacked (" in refusal()


@pytest.mark.parametrize("name", ["../jpg/image_00001.jpg", "/jpg/image_00001.jpg", "jpg/../../image_00001.jpg"])
def test_nothing_is_unpacked_but_pictures_in_their_folder(server, home, tmp_path, monkeypatch, name):
    with tarfile.open(home / NAMES[0], "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name))
        linked = tarfile.TarInfo("jpg/image_00002.jpg")
        linked.type, linked.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(linked)
    know(home, monkeypatch)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert "408 of the 408 images that imagelabels.mat names cannot be used" in refusal()
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_a_cache_that_cannot_be_written(server, home, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(official, "CACHE", tmp_path / "file" / "flowers102")
    assert "cannot be written" in (message := refusal()) and message.endswith("Set HOME to another folder")
    assert not server.asked


def test_a_disk_without_room(server, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert "the official archive, packed and unpacked need 0 MB" in refusal() and not server.asked


def test_class_names_that_differ(home, monkeypatch):
    names = ["tulip" if name == "rose" else name for name in Flowers102.classes]
    monkeypatch.setattr(Flowers102, "classes", names)
    message = refusal()
    assert "the classes of Flower102 have other names here than in torchvision 0." in message
    assert message.splitlines()[1:] == ["  label 74: 'rose' here, 'tulip' there"]


def test_what_a_killed_download_left_is_not_taken_for_the_archive(server):
    left = official.CACHE.with_name("flowers102.tmp")
    left.mkdir(parents=True)
    (left / NAMES[0]).write_bytes(b"half")
    assert official_archive() == official.CACHE and not left.exists()
    assert len(list((official.CACHE / "jpg").iterdir())) == 408


def test_of_two_that_start_at_once_one_fetches(server):
    with ThreadPoolExecutor(2) as both:
        assert list(both.map(lambda _: official_archive(), range(2))) == [official.CACHE] * 2
    assert sorted(server.asked) == [f"/{name}" for name in NAMES]


def test_a_cache_on_a_file_system_without_locks(server, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(official.fcntl, "flock", refuse)
    assert official_archive() == official.CACHE
