"""Read pictures with 16 bits a channel and convert them to 8 bits.

X-rays, CT and microscopy use 12 or fewer of the 16 bits. With 65535 as white such pictures would be black, and
different ones would become equal. So black and white are chosen from the values of the whole set.

Pillow decodes 16-bit grey in full, but keeps only one byte of each colour value. Colour pictures are therefore decoded
twice, the second time with the byte order swapped, which gives the other byte.
"""

import io
import re
import sys

import numpy as np
from PIL import Image

FULL = (0, 65535)
COLOUR = re.compile(r"(RGB|RGBA|LA);16([BLN])")
TIFF_BITS = 258


def is_deep(image: Image.Image) -> bool:
    """Return True if an opened picture has 16 bits a channel and `deep_values` can read it. Decodes nothing."""
    if "transparency" in image.info:
        return False  # one colour is transparent; Pillow handles that in 8 bits only
    return _is_grey(image) or _colour(image) is not None or _ppm_maximum(image) is not None


def deep_values(data: bytes, formats: tuple[str, ...]) -> np.ndarray:
    """The stored values, int32 [height, width, channels]. Signed values stay signed; EXIF rotation is not applied."""
    image = Image.open(io.BytesIO(data), formats=formats)
    maximum = _ppm_maximum(image)
    if _is_grey(image):
        return np.asarray(image).astype(np.int32)[:, :, None]
    if maximum is not None:
        stored = np.frombuffer(data, ">u2", 3 * image.width * image.height, image.tile[0].offset)
        return np.rint(stored.reshape(image.height, image.width, 3) * (65535.0 / maximum)).astype(np.int32)
    kind, order = COLOUR.fullmatch(_raw_mode(image)).groups()  # type: ignore[union-attr]
    if kind == "LA":  # stored as 4 bytes: two of grey, two of opacity
        stored = np.asarray(_read_as(image, "RGBA")).astype(np.int32)
        return stored[:, :, ::2] * 256 + stored[:, :, 1::2]
    little = "L" if order == "B" or (order == "N" and sys.byteorder == "big") else "B"
    other = Image.open(io.BytesIO(data), formats=formats)
    low, high = np.asarray(_read_as(other, f"{kind};16{little}")), np.asarray(image)
    return high.astype(np.int32) * 256 + low


def eight_bit(values: np.ndarray, levels: tuple[int, int]) -> Image.Image:
    """Scale `values` so that `levels` (black, white) become 0 and 255. Opacity always uses the full 16-bit range."""
    black, white = levels
    channels = values.shape[2]
    scaled = np.clip((values - black) * (255.0 / (white - black)), 0, 255)
    if channels in (2, 4):
        scaled[:, :, -1] = values[:, :, -1] / 257  # 65535 = 255 * 257
    pixels = np.rint(scaled).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def colours(values: np.ndarray) -> np.ndarray:
    """The values without opacity."""
    return values[:, :, :-1] if values.shape[2] in (2, 4) else values


def levels_of(lowest: int, highest: int) -> tuple[int, int]:
    """Black and white for values from `lowest` to `highest`, widened to powers of two, so that adding a few pictures
    seldom changes them."""
    black = -(1 << max(-lowest - 1, 0).bit_length()) if lowest < 0 else 0
    return black, (1 << max(highest, 255).bit_length()) - 1


def _is_grey(image: Image.Image) -> bool:
    if image.mode.startswith("I;16"):
        return True
    if image.mode != "I":
        return False
    return image.format in ("PPM", "PNG") or tuple(image.tag_v2.get(TIFF_BITS, ())) == (16,)


def _raw_mode(image: Image.Image) -> str:
    """Pillow's raw mode of the file's pixels; empty if tiles differ."""
    arguments = {tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0] for tile in _tiles(image)}
    return str(arguments.pop()) if len(arguments) == 1 else ""


def _tiles(image: Image.Image) -> list:
    return image.tile if image.format in ("PNG", "TIFF", "PPM") else []


def _colour(image: Image.Image) -> str | None:
    raw = _raw_mode(image)
    return raw if COLOUR.fullmatch(raw) and (image.format == "PNG" or not raw.startswith("LA")) else None


def _read_as(image: Image.Image, raw_mode: str) -> Image.Image:
    def changed(arguments: str | tuple) -> str | tuple:
        return raw_mode if isinstance(arguments, str) else (raw_mode, *arguments[1:])

    image.tile = [tile._replace(args=changed(tile.args)) for tile in _tiles(image)]
    image.load()
    return image


def _ppm_maximum(image: Image.Image) -> int | None:
    """The maximum value that a binary colour PPM declares, if it needs 16 bits; else None."""
    tiles = _tiles(image) if image.format == "PPM" else []
    if len(tiles) != 1 or tiles[0].codec_name != "ppm" or tiles[0].args[0] != "RGB":
        return None
    maximum = int(tiles[0].args[1])
    return maximum if maximum > 255 else None
