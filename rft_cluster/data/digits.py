"""The built-in data set: scikit-learn's handwritten digits, 1,797 real scans, shipped with the library.

They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI).
"""

import io
from functools import cache

import numpy as np
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data.assemble import assemble
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.data.reading import Labelled, decoded

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIDE = 56  # pixels; the 8x8 scans are too small to read, and smaller than one of Qwen2-VL's 28x28 image tokens


def load_digits(config: DataSection, seed: int) -> FewShotDataset:
    """The digits as grey 56x56 PNG images, labelled `zero` to `nine`.

    Raises:
        UserError: `data.path` is set, `data.classes` differs from the ten, or too many images are asked for.
    """
    if config.path is not None:
        raise UserError(f"data.path is {config.path}, but data.source is digits, which is built in: set source=folder")
    images = {scan.example_id: scan.image for scan in scans()}
    labelled = [Labelled(scan.example_id, scan.label) for scan in scans()]
    part = decoded(labelled, images.__getitem__, f"{len(labelled)} digits", config)
    return assemble("digits", {"train": part}, CLASSES, config, seed)


@cache  # the same 1,797 images each time; encoding them takes half a second
def scans() -> tuple[LabelledImage, ...]:
    """All scans, in scikit-learn's order."""
    from sklearn import datasets  # takes a second to import

    digits = datasets.load_digits()
    return tuple(
        LabelledImage(f"digits/{i:04d}", _png(scan), CLASSES[target])
        for i, (scan, target) in enumerate(zip(digits.images, digits.target, strict=True))
    )


def _png(scan: np.ndarray) -> bytes:  # scan: [8, 8], 0 (paper) to 16 (ink)
    small = Image.fromarray(np.rint(scan * 255 / 16).astype(np.uint8))
    file = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()
