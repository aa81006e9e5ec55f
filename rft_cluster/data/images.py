"""Encoded images: opening them as RGB, and refusing those that cannot be trusted or read."""

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from rft_cluster.common.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_BYTES = 50_000_000
MAX_RATIO = 200  # of the longer side to the shorter: above it Qwen2-VL's own resizing refuses (its `smart_resize`)
# What turns a picture upright, by the EXIF orientation that it is stored with.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow has no common base for what a malformed file makes it raise.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def open_image(data: bytes) -> Image.Image:
    """The decoded picture in RGB: turned as its EXIF says, transparency on white, 16-bit grey scaled to 8.

    Of an animation or a document, it is the first frame.

    Raises:
        ValueError: the pixels are 32-bit or floating point, which have no agreed black and white.
        OSError and others of `DECODE_ERRORS`: the bytes are not an image; `check_image` explains them.
    """
    image = upright(Image.open(io.BytesIO(data), formats=FORMATS))
    if image.mode.startswith("I;16"):
        eight_bit = np.rint(np.asarray(image) / 257).astype(np.uint8)  # 65535 = 255 * 257
        return Image.fromarray(eight_bit).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}); save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says. A broken EXIF block says nothing: viewers show the picture as it is."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except DECODE_ERRORS:
        return image
    return image if turn is None else image.transpose(turn)


def check_image(data: bytes, where: str) -> str:
    """Decode an image in full and return a digest of its pixels, equal for equal pictures in whatever
    encoding.

    The sizes are checked before any pixel is decoded. `where` names the image in the message.

    Raises:
        UserError: the image has too many bytes or pixels, none at all, is too narrow for Qwen2-VL, is of another
            format, or is damaged.
    """
    if not data:
        raise UserError(f"{where}: empty, 0 bytes")
    if len(data) > MAX_BYTES:
        raise UserError(f"{where}: larger than {MAX_BYTES // 10**6} MB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a broken comment and the like: the pixels are what counts
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                width, height = header.size
                _check_sides(width, height, where)
            picture = open_image(data)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: too many pixels ({error})") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: not an image in one of the formats {', '.join(FORMATS)}") from error
    except DECODE_ERRORS as error:
        raise UserError(f"{where}: damaged or unsupported ({error})") from error
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _check_sides(width: int, height: int, where: str) -> None:
    if not width * height:
        raise UserError(f"{where}: {width}x{height}, no pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UserError(
            f"{where}: {width}x{height}, one side more than {MAX_RATIO} times the other; Qwen2-VL takes none"
        )
