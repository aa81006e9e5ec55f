"""Convert pictures for the model: 16 bits a channel to 8, and oversized ones to the model's maximum size.

Generators and learners get the result as encoded bytes, so neither conversion concerns them.
"""

import hashlib
import io
from dataclasses import replace
from functools import partial

from PIL import Image

from rft_cluster.common.text import shown as safe
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import FewShotDataset, Pool
from rft_cluster.data.deep import FULL, colours, deep_values, is_deep, levels_of
from rft_cluster.data.images import FORMATS, MAX_PIXELS, open_image, pixel_limit
from rft_cluster.messages import Example


def as_shown(dataset: FewShotDataset, config: DataSection) -> FewShotDataset:
    """Re-encode 16-bit and oversized images, keep the SHA-256 of their files, and add a remark about it."""
    ranges: dict[str, tuple[int, int]] = {}
    examples = [example for split in dataset.splits.values() for example in split]
    for example in examples:
        found = deep_range(example.image, config.max_pixels)
        if found:
            ranges[example.example_id] = found
    levels = _levels(ranges, config) if ranges else None
    change = partial(shown_bytes, levels=levels, max_pixels=config.max_pixels)
    train, validation, test = ([_changed(e, change(e.image)) for e in split] for split in dataset.splits.values())
    pool = dataset.pool
    pool = pool.map(change) if isinstance(pool, Pool) else [change(image) for image in pool]
    remarks = dataset.remarks + (_remarks(ranges, levels) if levels else [])
    whole = replace(dataset, train=train, validation=validation, test=test, pool=pool)
    return replace(whole, remarks=remarks, levels=levels)


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
        picture.save(file, "PNG", compress_level=1)
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


def _changed(example: Example, image: bytes) -> Example:
    if image is example.image:
        return example
    return replace(example, image=image, sha256=hashlib.sha256(example.image).hexdigest())


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
