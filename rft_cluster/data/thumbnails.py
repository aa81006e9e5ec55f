"""Small copies of images for people: in the report of a run."""

import io

from PIL import Image

from rft_cluster.data.images import open_image

SIDE = 96  # pixels of the longer side, at most
EXACT = 64  # pixels: smaller images are kept as they are, since every pixel of a scanned digit counts
QUALITY = 72  # of WebP, 0 to 100: a photograph takes some 2.5 kB


def thumbnail(data: bytes) -> bytes:
    """An encoded image as WebP, scaled down to `SIDE`.

    Raises:
        DECODE_ERRORS: the bytes are not an image.
    """
    image = open_image(data, pixels=16 * SIDE * SIDE)
    exact = max(image.size) <= EXACT
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=exact, quality=QUALITY, method=2)
    return file.getvalue()
