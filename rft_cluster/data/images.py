"""Open encoded images as RGB, and refuse those that are unsafe or unreadable."""

import hashlib
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from rft_cluster.common.errors import UserError
from rft_cluster.config.bounds import MOST_DECODED
from rft_cluster.data.deep import FULL, deep_values, eight_bit, is_deep

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
MAX_BYTES = 50_000_000
MAX_PIXELS = 89_478_485  # Pillow's own limit: it warns above
# Larger pictures are scaled to this size on reading: 16,384 tokens of 28x28 pixels, Qwen2-VL's maximum.
SHOWN_PIXELS = 16_384 * 28 * 28
MAX_RATIO = 200  # longer side / shorter side; Qwen2-VL's `smart_resize` refuses more
# The transformation that turns a picture upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's exceptions for malformed files have no common base class.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_limit_lock = threading.RLock()


class Limits(NamedTuple):
    """Images beyond these limits are refused without decoding. Messages name `data.max_pixels` and `data.max_bytes` if
    `keys` is true."""

    pixels: int = MAX_PIXELS
    bytes: int = MAX_BYTES
    keys: bool = True


def open_image(data: bytes, levels: tuple[int, int] = FULL, pixels: int | None = None) -> Image.Image:
    """Decode a picture to 8-bit RGB: EXIF rotation applied, transparency on white, the first frame of several.

    `levels` are the 16-bit values that become black and white. A picture larger than `pixels` (or `MAX_PIXELS`) is
    scaled down to about that many pixels.

    Raises:
        ValueError: the pixels are 32-bit or floating point, which have no agreed black and white.
        OSError and others of `DECODE_ERRORS`: the bytes are not an image; `check_image` turns these into messages.
    """
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    size = _smaller(image.size, pixels)
    if size and image.format == "JPEG":
        image.draft(image.mode, size)  # JPEG: decode at 1/2, 1/4 or 1/8, with that much less time and memory
    if is_deep(image):
        turned, image = image, eight_bit(deep_values(data, FORMATS), levels)
        image = upright(image, turned.getexif())
    else:
        image = upright(image)
    if size and image.size not in (size, size[::-1]):
        turned_size = size if (image.width > image.height) == (size[0] > size[1]) else size[::-1]
        colours = image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image.convert("RGBA")
        image = colours.resize(turned_size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}); save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _smaller(size: tuple[int, int], pixels: int | None) -> tuple[int, int] | None:
    """The size to scale to, or None if the picture is small enough."""
    width, height = size
    limit = pixels or (SHOWN_PIXELS if width * height > MAX_PIXELS else width * height)
    if width * height <= limit:
        return None
    factor = (limit / (width * height)) ** 0.5
    return max(1, round(width * factor)), max(1, round(height * factor))


def upright(image: Image.Image, exif: Image.Exif | None = None) -> Image.Image:
    """Apply the EXIF orientation. A broken EXIF block is ignored, as viewers do."""
    image.load()
    try:
        turn = TURNS.get((exif or image.getexif()).get(ExifTags.Base.Orientation))
    except DECODE_ERRORS:
        return image
    return image if turn is None else image.transpose(turn)


def check_image(data: bytes, where: str, limits: Limits = Limits()) -> str:  # noqa: B008  (a constant)
    """Decode an image in full and return a digest of its pixels. Equal pictures have equal digests in any encoding.

    Sizes are checked before any pixel is decoded. The digest of a 16-bit picture covers all 16 bits. `where` names the
    image in the message.

    Raises:
        UserError: the image is empty, too large, too narrow for Qwen2-VL, of another format, or damaged.
    """
    if not data:
        raise UserError(f"{where}: empty, 0 bytes")
    if len(data) > limits.bytes:
        raise UserError(
            f"{where}: larger than {limits.bytes / 1e6:.4g} MB: save it smaller"
            + (f", or raise data.max_bytes ({limits.bytes} now)" if limits.keys else "")
        )
    try:
        with pixel_limit(limits.pixels):
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                _check_sides(header.width, header.height, where)
                deep = is_deep(header)
            values = deep_values(data, FORMATS) if deep else None
            if values is not None and (values % 257).any():
                return hashlib.sha256(repr(values.shape).encode() + values.astype("<i4").tobytes()).hexdigest()
            picture = open_image(data)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: too many pixels ({_too_many(error, limits)})") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: not an image in one of the formats {', '.join(FORMATS)}") from error
    except DECODE_ERRORS as error:
        raise UserError(f"{where}: damaged or unsupported ({error})") from error
    return pixel_digest(picture)


def image_sha256(data: bytes) -> str:
    """The `ImageRef.sha256` of a file's bytes, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def pixel_digest(picture: Image.Image) -> str:
    """SHA-256 of a decoded picture's size and pixels."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Within this context Pillow raises DecompressionBombWarning or -Error for a picture with more pixels."""
    with _limit_lock, warnings.catch_warnings():  # Pillow's limit and the warning filters are global to the process
        warnings.simplefilter("ignore")  # broken metadata does not matter, only the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _too_many(error: Exception, limits: Limits) -> str:
    found = re.search(r"\((\d+) pixels\)", str(error))
    size = f"{int(found[1]) / 1e6:.1f} million" if found else str(error)
    within = limits.keys and found and int(found[1]) <= MOST_DECODED
    cure = f", or set data.max_pixels={found[1]}" if found and within else ""
    return f"{size}, {limits.pixels / 1e6:.1f} million are allowed: scale it down{cure}"


def _check_sides(width: int, height: int, where: str) -> None:
    if not width * height:
        raise UserError(f"{where}: {width}x{height}, no pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UserError(
            f"{where}: {width}x{height}, one side more than {MAX_RATIO} times the other; Qwen2-VL takes none"
        )
