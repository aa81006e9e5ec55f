"""Pictures with 16 bits a channel, and huge ones: what the model is shown of them."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import FewShotDataset, load_dataset, manifest
from rft_cluster.data.deep import FULL, colours, deep_values, is_deep, levels_of
from rft_cluster.data.images import FORMATS, MAX_PIXELS, SHOWN_PIXELS, Limits, check_image, open_image
from rft_cluster.data.shown import shown_bytes
from tests.unit.data.test_bad_images import png

SIDE = 8


def png16(values: np.ndarray) -> bytes:
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    return png(SIDE, SIDE, 16, colour, b"".join(b"\0" + row.tobytes() for row in values.astype(">u2")))


def tiff16(values: np.ndarray, order: str = "<", kind: str = "u") -> bytes:
    """A TIFF by the specification, uncompressed, in either byte order, signed or not."""
    data, channels = values.astype(f"{order}{kind}2").tobytes(), values.shape[2]
    tags = [(256, 3, SIDE), (257, 3, SIDE), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, channels)]
    tags += [(278, 3, SIDE), (279, 4, len(data)), (339, 3, 2 if kind == "i" else 1)]
    entries = [
        struct.pack(f"{order}HHI", tag, type_, 1)
        + (struct.pack(f"{order}HH", value, 0) if type_ == 3 else struct.pack(f"{order}I", value))
        for tag, type_, value in tags
    ]
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)


def pnm16(values: np.ndarray) -> bytes:
    return b"P%d\n%d %d\n65535\n" % (5 if values.shape[2] == 1 else 6, SIDE, SIDE) + values.astype(">u2").tobytes()


KINDS = {
    **{f"png {channels}": (png16, channels, 0) for channels in (1, 2, 3, 4)},
    "tiff": (tiff16, 1, 0),
    "tiff, big-endian": (lambda values: tiff16(values, ">"), 1, 0),
    "tiff, signed": (lambda values: tiff16(values, "<", "i"), 1, -1024),
    "tiff, signed, big-endian": (lambda values: tiff16(values, ">", "i"), 1, -1024),
    "pgm": (pnm16, 1, 0),
    "ppm": (pnm16, 3, 0),
}


def values_of(seed: int, channels: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, (SIDE, SIDE, channels)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("high", [1, 120, 4095, 32767])
def test_all_16_bits_are_read_and_scaled(kind, high):
    encode, channels, low = KINDS[kind]
    values = values_of(0, channels, low, high)
    data = encode(values)
    assert is_deep(Image.open(io.BytesIO(data)))
    assert (deep_values(data, FORMATS) == values).all()
    shown = np.asarray(Image.open(io.BytesIO(shown_bytes(data, (low, high)))))
    if channels in (1, 3):  # the others are shown on white
        expected = np.rint((values - low) * 255 / (high - low))
        assert (shown == np.broadcast_to(expected, (SIDE, SIDE, 3))).all()
    other = values.copy()
    other[0, 0, 0] = low if other[0, 0, 0] != low else low + 1
    assert check_image(encode(other), "") != check_image(data, "")  # by one value, which 8 bits may not tell


def test_8_bits_are_not_deep():
    for mode, file_format in (
        ("L", "PNG"),
        ("RGB", "TIFF"),
        ("RGBA", "PNG"),
        ("L", "PPM"),
        ("RGB", "PPM"),
        ("1", "PNG"),
    ):
        file = io.BytesIO()
        Image.new(mode, (4, 4)).save(file, file_format)
        assert not is_deep(Image.open(io.BytesIO(file.getvalue())))
        assert shown_bytes(file.getvalue(), (0, 255)) == file.getvalue()


@pytest.mark.parametrize("seed", range(50))
def test_levels_hold_all_values_and_waste_less_than_half(seed):
    random = np.random.default_rng(seed)
    low, high = sorted(int(v) for v in random.integers(-(2 ** random.integers(0, 16)), 2 ** random.integers(0, 17), 2))
    black, white = levels_of(low, high)
    assert black <= min(low, 0) and white >= max(high, 255)
    assert black > 2 * min(low, 0) - 1 and white < 2 * max(high, 255) + 1


def fill(root: Path, encode, channels: int, low: int, high: int) -> Path:
    for i, label in enumerate(label for label in ("a", "b") for _ in range(6)):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{i}.png").write_bytes(encode(values_of(i, channels, low, high)))
    return root


def load(root: Path, **values) -> FewShotDataset:
    return load_dataset(
        DataSection(**{"source": "folder", "path": root, "shots": 1, "validation": 2, "test": 4, **values}), 0
    )


def brightest(dataset: FewShotDataset) -> int:
    return max(np.asarray(open_image(image)).max() for image in (dataset.image(dataset.train[0]), *dataset.pool))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("high", [120, 4095])
def test_a_set_of_few_values_keeps_its_range(tmp_path, kind, high):
    encode, channels, low = KINDS[kind]
    root = fill(tmp_path, encode, channels, low, high)
    dataset = load(root)  # of 0 to 120 all were one picture once, with two labels
    assert dataset.levels == levels_of(low, high) and dataset.copies == {}
    assert f"{dataset.levels[0]} is shown as black and {dataset.levels[1]} as white" in dataset.notes()[0]
    assert brightest(dataset) > 100
    full = load(root, sixteen_bit="full")
    assert full.levels == FULL and "use less than a sixteenth" in full.notes()[1]
    cure = json.loads(full.notes()[1].split("data.sixteen_bit=")[1].rstrip("'"))
    cured = load(root, sixteen_bit=cure)
    assert cured.levels == tuple(cure) and len(cured.notes()) == 1 and brightest(cured) == 255


def test_the_manifest_keeps_the_levels_and_the_files_digests(tmp_path):
    root = fill(tmp_path / "photos", png16, 1, 0, 4095)
    config = DataSection(source="folder", path=root, shots=1, validation=2, test=4)
    first = load_dataset(config, 0)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(first, 0)))
    (root / "a/new.png").write_bytes(png16(values_of(99, 1, 0, 65535)))
    again = load(root, manifest=tmp_path / "manifest.json")
    assert again.levels == (0, 4095) and again.splits == first.splits
    # Manifests of earlier runs say nothing of levels: they had all 16 bits.
    old = {key: value for key, value in manifest(first, 0).items() if key != "levels"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load(root, manifest=tmp_path / "old.json").levels == FULL


def test_opacity_is_no_value():
    values = np.full((SIDE, SIDE, 2), 65535, np.int32)
    values[:, :, 0] = 7
    assert colours(values).max() == 7


# --- huge ones


def huge(width: int, height: int, file_format: str) -> bytes:
    file = io.BytesIO()
    picture = Image.new("L", (width, height), 200)
    picture.paste(10, (0, 0, width // 2, height))
    picture.save(file, file_format)
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_huge_picture_is_refused_with_a_cure_that_works(file_format):
    data = huge(12_000, 9_000, file_format)
    with pytest.raises(UserError, match=r"too many pixels \(108\.0 million, 89\.5 million are allowed") as caught:
        check_image(data, "a.jpg")
    limits = Limits(pixels=int(str(caught.value).split("data.max_pixels=")[1].rstrip(")")))
    check_image(data, "a.jpg", limits)
    shown = shown_bytes(data, None, limits.pixels)
    picture = open_image(shown)
    assert picture.width * picture.height == pytest.approx(SHOWN_PIXELS, rel=0.01)
    assert picture.width / picture.height == pytest.approx(12 / 9, rel=0.01)
    assert picture.getpixel((9, 9))[0] < 30 and picture.getpixel((picture.width - 9, 9))[0] > 180
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS  # Pillow's own limit is as it was


def test_too_many_bytes_are_refused_with_a_cure_that_works():
    data = png16(values_of(0, 1, 0, 9)) + bytes(2000)
    with pytest.raises(
        UserError, match=r"larger than 0\.001 MB: save it smaller, or raise data.max_bytes \(1000 now\)"
    ):
        check_image(data, "a.png", Limits(bytes=1000))
    with pytest.raises(UserError, match=r"save it smaller$"):  # where there is no key
        check_image(data, "a.png", Limits(bytes=1000, keys=False))
    check_image(data, "a.png", Limits(bytes=len(data)))


@pytest.mark.parametrize("size", [(640, 480), (3000, 2000), (57, 56), (56, 56), (2000, 11)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_picture_is_scaled_as_it_is_read(size, file_format):
    data = huge(*size, file_format)
    small = open_image(data, pixels=3136)
    assert small.width * small.height <= max(3136 * 1.05, 0)
    assert (
        small.size == size
        if size == (56, 56)
        else small.width / small.height == pytest.approx(size[0] / size[1], rel=0.2)
    )
    assert small.getpixel((0, 0))[0] < 40 and small.getpixel((small.width - 1, 0))[0] > 170
