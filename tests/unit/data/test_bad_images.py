"""Pictures of every kind, good and bad, as they lie in real folders: one listing, no traceback, the right colours."""

import io
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import load_dataset
from rft_cluster.data.images import MAX_BYTES, check_image, open_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SIZE = (32, 16)
CORNERS = ((2, 2), (29, 2), (2, 13), (29, 13))


def flag() -> Image.Image:
    """Four corners of one colour each, along JPEG's 8x8 blocks."""
    image = Image.new("RGB", SIZE, RED)
    for box, colour in (((16, 0, 32, 8), GREEN), ((0, 8, 16, 16), BLUE), ((16, 8, 32, 16), WHITE)):
        image.paste(colour, box)
    return image


def see_through() -> Image.Image:
    """The flag with its white corner transparent, over black."""
    image = flag().convert("RGBA")
    image.paste((0, 0, 0, 0), (16, 8, 32, 16))
    return image


def grey(mode: str, low: int, high: int) -> Image.Image:
    """Dark, but for the white corner."""
    image = Image.new(mode, SIZE, low)
    image.paste(high, (16, 8, 32, 16))
    return image


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by the specification; `rows` are the scan lines, each with its filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


def png16(image: Image.Image, colour: int) -> bytes:
    """The picture with 16 bits a channel: 257 times each value."""
    pixels = (np.asarray(image).astype(">u2") * 257).astype(">u2")
    return png(*image.size, 16, colour, b"".join(b"\0" + row.tobytes() for row in pixels))


def with_profile(profile: bytes) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(flag()))
    return png(*SIZE, 8, 2, rows, chunk(b"iCCP", b"profile\0\0" + profile))


def with_exif(orientation: int) -> bytes:
    """The flag stored so that turning it as EXIF says gives it back."""
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # shown a quarter turn clockwise
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(flag().transpose(stored[orientation]), "JPEG", quality=95, subsampling=0, exif=exif)


def jpeg(**options) -> bytes:
    return encoded(flag(), "JPEG", quality=95, subsampling=0, **options)


def palette() -> bytes:
    """A palette in which the last of the colours is transparent (and black)."""
    image = flag().quantize(4, dither=Image.Dither.NONE)
    white = image.getpixel(CORNERS[3])
    colours = image.getpalette()
    colours[3 * white : 3 * white + 3] = [0, 0, 0]
    image.putpalette(colours)
    return encoded(image, transparency=white)


def damage(data: bytes, *positions: int) -> bytes:
    changed = bytearray(data)
    for position in positions:
        changed[position] ^= 0xFF
    return bytes(changed)


FLAG = (RED, GREEN, BLUE, WHITE)
DARK = ((51, 51, 51),) * 3 + (WHITE,)
BLACK = ((0, 0, 0),) * 3 + (WHITE,)
OTHER = Image.new("RGB", SIZE, (9, 9, 9))  # of further frames and pages, which are not to be seen

GOOD: dict[str, tuple[bytes, tuple]] = {
    "rgb.png": (encoded(flag()), FLAG),
    "UPPER.PNG": (encoded(flag()), FLAG),
    "für Elise, 1 – 2.png": (encoded(flag()), FLAG),
    "plain.bmp": (encoded(flag(), "BMP"), FLAG),
    "lossless.webp": (encoded(flag(), "WEBP", lossless=True), FLAG),
    "see_through.webp": (encoded(see_through(), "WEBP", lossless=True), FLAG),
    "see_through.png": (encoded(see_through()), FLAG),
    "palette.png": (palette(), FLAG),
    "animated.gif": (encoded(flag(), "GIF", save_all=True, append_images=[OTHER, OTHER]), FLAG),
    "animated.webp": (encoded(flag(), "WEBP", save_all=True, append_images=[OTHER], lossless=True), FLAG),
    "animated.png": (encoded(flag(), "PNG", save_all=True, append_images=[OTHER]), FLAG),
    "pages.tif": (encoded(flag(), "TIFF", save_all=True, append_images=[OTHER]), FLAG),
    "lzw.tiff": (encoded(flag(), "TIFF", compression="tiff_lzw"), FLAG),
    "cmyk.tif": (encoded(flag().convert("CMYK"), "TIFF"), FLAG),
    "rgb16.png": (png16(flag(), 2), FLAG),
    "rgba16.png": (png16(see_through(), 6), FLAG),
    "profile.png": (with_profile(b"this is no zlib stream"), FLAG),
    "profile_too.png": (with_profile(zlib.compress(b"this is no profile")), FLAG),
    "jpeg.jpg": (jpeg(), FLAG),
    "jpeg.png": (jpeg(), FLAG),
    "progressive.jpeg": (jpeg(progressive=True), FLAG),
    "cmyk.jpg": (encoded(flag().convert("CMYK"), "JPEG", quality=95, subsampling=0), FLAG),
    "profile.jpg": (jpeg(icc_profile=b"this is no profile"), FLAG),
    "exif.jpg": (jpeg(exif=b"Exif\0\0this is no EXIF block"), FLAG),
    "exif_too.jpg": (jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"), FLAG),
    "two_in_one.jpg": (encoded(flag(), "MPO", save_all=True, append_images=[OTHER], quality=95, subsampling=0), FLAG),
    **{f"turned{orientation}.jpg": (with_exif(orientation), FLAG) for orientation in range(2, 9)},
    "grey.png": (encoded(grey("L", 51, 255)), DARK),
    "grey.jpg": (encoded(grey("L", 51, 255), "JPEG", quality=95), DARK),
    "grey_alpha.png": (encoded(grey("LA", (51, 255), (51, 0))), DARK),
    "grey16.png": (png16(grey("L", 51, 255), 0), DARK),
    "grey16_alpha.png": (png16(grey("LA", (51, 255), (51, 0)), 4), DARK),
    "grey16.tif": (encoded(grey("I;16", 51 * 257, 65535), "TIFF"), DARK),
    "grey16_big_endian.tif": (encoded(grey("I;16B", 51 * 257, 65535), "TIFF"), DARK),
    "one_bit.png": (encoded(grey("1", 0, 1)), BLACK),
    "one_bit.tif": (encoded(grey("1", 0, 1), "TIFF", compression="group4"), BLACK),
    "one_pixel.png": (encoded(Image.new("RGB", (1, 1), RED)), (RED,)),
    "ratio_200.png": (encoded(Image.new("RGB", (400, 2), BLUE)), (BLUE,)),
}

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
FRAME = b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\0;"

BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "empty, 0 bytes"),
    "text.png": (b"hello, this is text\n", "not an image"),
    "zeros.jpg": (bytes(500), "not an image"),
    "page.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "archive.png": (b"PK\x03\x04" + bytes(100), "not an image"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "drawing.svg": (SVG, "not an image"),
    "drawing.png": (SVG, "not an image"),
    "phone.heic": (HEIC, "not an image"),
    "phone.jpg": (HEIC, "not an image"),
    "avif.webp": (b"\0\0\0\x1cftypavif" + bytes(100), "not an image"),
    "cut.png": (encoded(NOISE)[:-200], "damaged"),
    "cut.jpg": (encoded(NOISE, "JPEG")[:2000], "damaged"),
    "cut_progressive.jpg": (encoded(NOISE, "JPEG", progressive=True)[:2000], "damaged"),
    "cut.webp": (encoded(NOISE, "WEBP")[:1000], "damaged"),
    "cut.bmp": (encoded(NOISE, "BMP")[:1000], "damaged"),
    "cut.gif": (encoded(NOISE, "GIF")[:1500], "damaged"),
    "cut.tif": (encoded(NOISE, "TIFF")[:3000], "damaged"),
    "head.jpg": (encoded(NOISE, "JPEG")[:25], "damaged|not an image"),
    "wrong_sum.png": (damage(encoded(NOISE), 20), "damaged|not an image|too many pixels"),
    "comment_bomb.png": (
        png(1, 1, 8, 0, b"\0\0", chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(99_000_000)))),
        "damaged or unsupported .*too large",
    ),
    "huge.png": (png(10_000, 9_000, 8, 2, bytes(9)), "too many pixels"),
    "enormous.png": (png(60_000, 60_000, 8, 2, bytes(9)), "too many pixels"),
    "bomb.gif": (b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + FRAME, "too many pixels"),
    "bomb_inside.gif": (b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0) + FRAME, "too many pixels"),
    "nothing.gif": (b"GIF89a" + bytes(7) + b",\0\0\0\0\0\0\0\0\0\x02\0;", "no pixels|damaged|not an image"),
    "ratio.png": (encoded(Image.new("RGB", (201, 1))), "201x1, one side more than 200 times the other"),
    "tall.jpg": (encoded(Image.new("L", (2, 402)), "JPEG"), "2x402, one side more than 200"),
    "float.tif": (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "32-bit numbers"),
    "whole.tif": (encoded(Image.new("I", (2, 2), 70_000), "TIFF"), "32-bit numbers"),
    "red\x1b[31m\nrose.png": (b"text", "not an image"),
}


def special(folder: Path) -> dict[str, str]:
    """Files that are not plain or not readable: name -> reason."""
    outside = folder.parent.parent / "secret.png"
    outside.write_bytes(encoded(flag()))
    (folder / "link_out.png").symlink_to(outside)
    (folder / "link_up.png").symlink_to("../../secret.png")
    (folder / "link_nowhere.png").symlink_to("nothing.png")
    (folder / "link_loop.png").symlink_to("link_loop.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    with (folder / "too_large.bmp").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    os.close(os.open(os.fsencode(folder) + b"/latin1-\xe9.png", os.O_CREAT))
    return {
        "link_out.png": "a link out of the folder",
        "link_up.png": "a link out of the folder",
        "link_nowhere.png": "not a file, or a link to nothing",
        "link_loop.png": "a link to (itself|nothing)",  # Python 3.13 does not say which
        "folder.png": "a folder, not a file",
        "pipe.png": "not a file, or a link to nothing",
        "too_large.bmp": "larger than 50 MB",
        "latin1-\udce9.png": "its name is not UTF-8",
    }


def escaped(name: str) -> str:
    return name.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\udce9", "\\udce9")


@pytest.fixture
def corpus(tmp_path) -> tuple[Path, dict[str, str]]:
    """A folder of two classes; all pictures of every kind lie in the first. And the bad ones' reasons, by id."""
    root = tmp_path / "photos"
    for i in range(6):
        (root / "tulip").mkdir(parents=True, exist_ok=True)
        (root / f"tulip/{i}.png").write_bytes(encoded(Image.new("RGB", (2, 2), (i, i, i))))
    (root / "rose").mkdir()
    for name, (data, _) in {**GOOD, **BAD}.items():
        (root / "rose" / name).write_bytes(data)
    reasons = {name: reason for name, (_, reason) in BAD.items()} | special(root / "rose")
    return root, {f"rose/{name}": reason for name, reason in reasons.items()}


def section(root: Path, **values) -> DataSection:
    return DataSection(**{"source": "folder", "path": root, "shots": 2, "validation": 2, "test": 2, **values})


@pytest.mark.filterwarnings("error")  # nothing is muttered beside the listing
def test_one_listing_names_every_bad_file_once(corpus):
    root, reasons = corpus
    with pytest.raises(UserError) as caught:
        load_dataset(section(root), 0)
    first, *lines = str(caught.value).splitlines()
    assert first == (
        f"{len(reasons)} of the {len(reasons) + len(GOOD) + 6} image files in data.path ({root}) cannot be used; "
        f"fix or remove them, or set data.on_bad_image=skip:"
    )
    assert len(lines) == len(reasons) <= 40
    for example_id, reason in reasons.items():
        (line,) = [line for line in lines if line.startswith(f"  {escaped(example_id)}: ")]
        assert re.search(reason, line), line
    str(caught.value).encode()  # can be printed


def test_bad_files_can_be_skipped_and_are_named(corpus):
    root, reasons = corpus
    dataset = load_dataset(section(root, on_bad_image="skip"), 0)
    assert set(dataset.skipped) == set(reasons)
    # All that is good is there, the lossless ones as copies of one another.
    used = [*dataset.pool, *(dataset.image(e) for e in (*dataset.validation, *dataset.test))]
    assert len(used) + len(dataset.copies) == len(GOOD) + 6
    assert "rose/plain.bmp" in dataset.copies and "rose/grey16.tif" in dataset.copies
    copies, skipped = dataset.notes()
    assert copies.startswith(f"left out {len(dataset.copies)} copies of other images (first: rose/")
    assert skipped.startswith(f"skipped {len(reasons)} images that cannot be used:\n  rose/")
    assert len(skipped.splitlines()) == 1 + len(reasons)


def test_a_class_that_skipping_leaves_too_small_says_so(corpus):
    root, reasons = corpus
    with pytest.raises(UserError) as caught:
        load_dataset(section(root, on_bad_image="skip", shots=40), 0)
    assert re.search(
        rf"\n  'rose': \d+, and {len(reasons)} skipped that cannot be used\n  'tulip': 6$", str(caught.value)
    )
    with pytest.raises(UserError, match=rf"and without the {len(reasons)} skipped that cannot be used; do one"):
        load_dataset(section(root, on_bad_image="skip", test=1000), 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, and the picture is shown all the same
@pytest.mark.parametrize("name", GOOD)
def test_every_good_kind_has_its_colours_in_their_places(name):
    data, colours = GOOD[name]
    check_image(data, name)
    image = open_image(data)
    assert image.mode == "RGB"
    if len(colours) == 4:
        assert image.size == SIZE
    for (x, y), colour in zip(CORNERS if len(colours) == 4 else [(0, 0)], colours, strict=True):
        # JPEG's rounding, and no more: a wrong turn or an inverted channel is off by 204 and more.
        assert np.abs(np.subtract(image.getpixel((x, y)), colour)).max() <= (
            3 if b"JFIF" in data or b"Adobe" in data else 0
        )


@pytest.mark.parametrize(
    "name", [name for name in GOOD if GOOD[name][1] is FLAG and not name.endswith(("jpg", "jpeg"))]
)
def test_lossless_kinds_are_copies_of_each_other(name):
    if name != "jpeg.png":
        assert check_image(GOOD[name][0], "") == check_image(GOOD["rgb.png"][0], "")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_changed_bytes_are_a_user_error_or_do_no_harm(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_itxt("comment", "hello", zip=True)
    extra = {"PNG": {"pnginfo": text, "exif": exif}, "JPEG": {"exif": exif}, "WEBP": {"exif": exif}}
    whole = encoded(NOISE.resize((12, 9)), file_format, **extra.get(file_format, {}))
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        for position in random.integers(0, min(len(whole), 200), size=3):
            changed[position] = random.integers(0, 256)
        try:
            check_image(bytes(changed[: random.integers(len(whole) // 2, 2 * len(whole))]), "a.png")
        except UserError as error:
            refused += str(error).startswith("a.png: ")
    assert refused > 20


def as_nobody(work: Callable[[], None]) -> None:
    """Root may read everything; the rights of files are tried as another user."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        work()
    finally:
        os.seteuid(mine)


def test_files_and_folders_that_may_not_be_read_are_named():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root = Path(name)
        root.chmod(0o755)
        for i in range(8):
            folder = root / ("rose" if i % 2 else "tulip")
            folder.mkdir(exist_ok=True)
            (folder / f"{i}.png").write_bytes(encoded(Image.new("RGB", (2, 2), (i, i, i))))
        (root / "rose/1.png").chmod(0)

        def one_file() -> None:
            with pytest.raises(UserError, match=r"\n  rose/1.png: Permission denied$"):
                load_dataset(section(root), 0)

        def one_folder() -> None:
            with pytest.raises(UserError, match=r"tulip cannot be read: Permission denied"):
                load_dataset(section(root), 0)

        as_nobody(one_file)
        (root / "tulip").chmod(0)
        as_nobody(one_folder)
        (root / "tulip").chmod(0o755)
