import io
import threading
import zipfile
from dataclasses import replace

import pytest
from PIL import Image

from rft_cluster.data.images import image_sha256
from rft_cluster.data.thumbnails import SIDE, thumbnail
from rft_cluster.run import thumbnails
from tests.unit.run.begun import DATASET, picture

SHA = "ab" * 32


def encoded(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def test_a_thumbnail_is_small_and_a_tiny_picture_is_exact():
    assert Image.open(io.BytesIO(thumbnail(encoded(960, 480)))).size == (SIDE, SIDE // 2)
    small = Image.open(io.BytesIO(thumbnail(picture((12, 34, 56)))))
    assert small.size == (8, 8) and small.convert("RGB").getpixel((3, 3)) == (12, 34, 56)


def test_what_is_written_is_read_back(tmp_path):
    thumbnails._write(tmp_path / thumbnails.FILE, replace(DATASET, images={**DATASET.images, "none": b"no picture"}))
    found = thumbnails.read_thumbnails(tmp_path)
    assert set(found) == {image_sha256(picture("red")), image_sha256(picture("yellow"))}


def test_a_run_s_thumbnails_are_kept_beside_its_work_and_once(tmp_path):
    def writing() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "thumbnails"]

    def keep(images: dict[str, bytes]) -> set[bytes]:
        thumbnails.keep_thumbnails(tmp_path, replace(DATASET, images=images))
        for thread in writing():
            thread.join()
        return set(thumbnails.read_thumbnails(tmp_path))

    first = dict(list(DATASET.images.items())[:1])
    assert keep(first) == set(first)
    assert keep(DATASET.images) == set(DATASET.images), "the launch of the first failed: nothing but them is there"
    (tmp_path / "config.yaml").touch()
    assert keep(first) == set(DATASET.images)


def test_images_that_cannot_be_decoded_are_left_out_and_there_is_a_limit(monkeypatch):
    images = {"a": picture("red"), "b": b"no picture", "c": picture("blue")}
    assert set(thumbnails.thumbnails(["a", "b", "gone", "c"], images)) == {"a", "c"}
    monkeypatch.setattr(thumbnails, "MOST_BYTES", 1)
    assert set(thumbnails.thumbnails(["a", "c"], images)) == {"a"}


@pytest.mark.parametrize("name", ["../../x.webp", f"{SHA}.webp/x", f"{SHA}.html", f"{'g' * 64}.webp"])
def test_other_names_in_a_stranger_s_archive_are_passed_over(tmp_path, name):
    with zipfile.ZipFile(tmp_path / thumbnails.FILE, "w") as archive:
        archive.writestr(name, b"x")
        archive.writestr(f"{SHA}.webp", b"y")
    assert thumbnails.read_thumbnails(tmp_path) == {SHA: b"y"}


def test_a_bomb_or_a_damaged_archive_gives_no_pictures(tmp_path):
    file = tmp_path / thumbnails.FILE
    for kind, size in ((zipfile.ZIP_STORED, 10**6), (zipfile.ZIP_DEFLATED, 10**4)):
        with zipfile.ZipFile(file, "w", kind) as archive:
            archive.writestr(f"{SHA}.webp", bytes(size))
        assert thumbnails.read_thumbnails(tmp_path) == {}
    with file.open("r+b") as archive:  # in the compressed bytes, whose error is zlib's own
        archive.seek(30 + len(f"{SHA}.webp"))
        archive.write(b"\xff" * 4)
    assert thumbnails.read_thumbnails(tmp_path) == {}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{SHA}.webp", b"y")
    longer = file.read_bytes().replace((1).to_bytes(4, "little") * 2, (900).to_bytes(4, "little") * 2)
    assert longer != file.read_bytes()
    for content in (b"no archive", file.read_bytes()[:-30], b"", longer):  # the last claims more than there is
        file.write_bytes(content)
        assert thumbnails.read_thumbnails(tmp_path) == {}
    file.unlink()
    assert thumbnails.read_thumbnails(tmp_path) == {}
