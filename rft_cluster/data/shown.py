"""Convert pictures for the model: 16 bits a channel to 8, and oversized ones to the model's maximum size.

Generators and learners get the result as encoded bytes, so neither conversion concerns them.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from rft_cluster.common.progress import with_progress
from rft_cluster.common.text import shown as safe
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.deep import FULL, colours, deep_values, is_deep, levels_of
from rft_cluster.data.images import FORMATS, MAX_PIXELS, open_image, pixel_digest, pixel_limit
from rft_cluster.data.lazy import Pool

COMPRESSION = 1  # of zlib, 0 to 9


class View(NamedTuple):
    """The model's image size: it scales images with more than `pixels` down to `size(width, height)`."""

    pixels: int
    size: Callable[[int, int], tuple[int, int]]


WHOLE = View(2**63, lambda width, height: (width, height))


def as_shown(dataset: FewShotDataset, config: DataSection, view: View) -> FewShotDataset:
    """Read the images into memory in the form for the model, and add a remark about conversions.

    Each image is read, scaled down and encoded before the next one is read: 2,000 photographs of 12 megapixels are 10
    GB of files, and 70 GB when decoded.
    """
    images: dict[str, bytes] = {}
    whole_pixels = dict(dataset.whole_pixels)
    deep: dict[str, tuple[int, int]] = {}  # lowest and highest value of each 16-bit image
    limit = config.max_pixels

    def keep(sha256: str, data: bytes, levels: tuple[int, int] | None) -> None:
        shown = shown_bytes(data, levels, limit)
        images[sha256] = fitted(shown, view)
        # The digest is that of the picture as shown, at full size. A source knows it unless the picture is converted.
        if shown is not data or (images[sha256] is not data and sha256 not in whole_pixels):
            whole_pixels[sha256] = pixel_digest(open_image(shown))

    for sha256 in with_progress(list(dataset.images), "making images as small as the model looks at them"):
        data = dataset.images[sha256]
        if values := deep_range(data, limit):
            deep[sha256] = values  # converted later: the levels depend on all of them
        else:
            keep(sha256, data, None)
    levels = _levels(deep, config) if deep else None
    for sha256 in with_progress(list(deep), "making images with 16 bits a channel as the model is shown them"):
        keep(sha256, dataset.images[sha256], levels)
    pool = Pool(range(len(dataset.pool)), lambda index: shown_bytes(dataset.pool[index], levels, limit))
    whole = replace(dataset, images=images, whole_pixels=whole_pixels, pool=pool)
    if levels is None:
        return whole
    ids = {e.image.sha256: e.example_id for split in dataset.splits.values() for e in split}
    ranges = {ids[sha256]: values for sha256, values in deep.items()}
    return replace(whole, levels=levels, remarks=dataset.remarks + _remarks(ranges, levels))


def fitted(data: bytes, view: View) -> bytes:
    """Scale an image to the size at which it is kept. Returns it as PNG.

    Returns the image unchanged if that would be no smaller or take more bytes. Training, evaluation and prediction all
    call this, so a policy always sees an image in the same form.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as header:
        width, height = header.size
    if kept_size(width, height, view) == (width, height):
        return data
    picture = open_image(data)  # upright: width and height may be swapped
    file = io.BytesIO()
    # Use the same filter as the model's processor.
    picture.resize(kept_size(picture.width, picture.height, view)).save(file, "PNG", compress_level=COMPRESSION)
    return file.getvalue() if file.tell() < len(data) else data


def kept_size(width: int, height: int, view: View) -> tuple[int, int]:
    """(width, height) at which an image is kept: the smallest that the model resizes to the same size as the original.

    Usually this is the model's own size, which the model does not resize again, so nothing is lost. If `min_pixels` is
    close to `max_pixels`, the model would enlarge an image of its own size; then the kept size is about twice as large.
    """
    if width * height <= view.pixels:
        return width, height
    target = view.size(width, height)
    pixels = target[0] * target[1]
    if not 0 < pixels < width * height:
        return width, height
    if view.size(*target) == target:
        return target
    for times in (2, 3, 4):  # more than 2 in case rounding leads to another size
        scale = times * (pixels / (width * height)) ** 0.5
        larger = round(width * scale), round(height * scale)
        if scale < 1 and view.size(*larger) == target:
            return larger
    return width, height


def shown_bytes(data: bytes, levels: tuple[int, int] | None, max_pixels: int = MAX_PIXELS) -> bytes:
    """The encoded image itself, or its conversion. Without `levels` a 16-bit picture gets the levels of its own values.

    `data` must have passed `check_image` with the same `max_pixels`.
    """
    with pixel_limit(max_pixels):
        header = Image.open(io.BytesIO(data), formats=FORMATS)
        if not is_deep(header) and header.width * header.height <= MAX_PIXELS:
            return data
        if levels is None and is_deep(header):
            levels = levels_of(*_range(data))
        picture = open_image(data, levels or FULL)
    file = io.BytesIO()
    if header.format == "JPEG":
        picture.save(file, "JPEG", quality=95, subsampling=0)
    else:
        picture.save(file, "PNG", compress_level=COMPRESSION)
    return file.getvalue()


def deep_range(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """The lowest and highest value of a picture with 16 bits a channel; None for other pictures."""
    with pixel_limit(max_pixels):
        if not is_deep(Image.open(io.BytesIO(data), formats=FORMATS)):
            return None
        return _range(data)


def _range(data: bytes) -> tuple[int, int]:
    values = colours(deep_values(data, FORMATS))
    return int(values.min()), int(values.max())


def _levels(ranges: dict[str, tuple[int, int]], config: DataSection) -> tuple[int, int]:
    if isinstance(config.sixteen_bit, tuple):
        return config.sixteen_bit
    if config.sixteen_bit == "full":
        return FULL
    return levels_of(min(low for low, _ in ranges.values()), max(high for _, high in ranges.values()))


def _remarks(ranges: dict[str, tuple[int, int]], levels: tuple[int, int]) -> list[str]:
    black, white = levels
    lowest, highest = min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())
    remarks = [
        f"{len(ranges)} pictures have 16 bits a channel, values {lowest} to {highest}: {black} is shown as black and "
        f"{white} as white (data.sixteen_bit)"
    ]
    used = {i: (min(high, white) - max(low, black)) / (white - black) for i, (low, high) in ranges.items()}
    narrow = [example_id for example_id, share in used.items() if share < 1 / 16]
    if narrow:
        remarks.append(
            f"{len(narrow)} of them use less than a sixteenth of that and look nearly of one grey (first: "
            f"{safe(narrow[0])}, values {ranges[narrow[0]][0]} to {ranges[narrow[0]][1]}): set the two values, e.g. "
            f"'data.sixteen_bit=[{lowest}, {_common_top(ranges)}]'"
        )
    return remarks


def _common_top(ranges: dict[str, tuple[int, int]]) -> int:
    """A white level that half of the pictures reach: the median of their maxima, above the lowest value of all."""
    tops = sorted(high for _, high in ranges.values())
    return max(tops[len(tops) // 2], min(low for low, _ in ranges.values()) + 1)
