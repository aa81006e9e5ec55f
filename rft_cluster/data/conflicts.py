"""Find pictures with two labels, and pictures that look the same in different splits."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.common.progress import with_progress
from rft_cluster.common.text import shown
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import FewShotDataset, listing
from rft_cluster.data.images import FORMATS, open_image, upright
from rft_cluster.data.reading import Labelled

SIDE = 16  # pixels; pictures are compared by small copies of this size
# Two small copies whose RMS difference is at most this (in grey levels, 0 to 255) are the same picture. Measured on
# scikit-learn's two sample photographs: re-encoding (JPEG at quality 40, PNG, WebP) and scaling to 224 pixels give at
# most 1.5, cropping 1 % off one side at least 3.6. A false match costs little: the picture only leaves the test set.
SAME_PICTURE = 3.0
# Two pictures up to this difference are noted as looking the same. 63x63 thumbnails give at most 4.2; no two of 900
# handwritten digits differ by less than 14.
LOOKS_THE_SAME = 5.0
# A small copy closer than this to its own mean is nearly one colour, which says nothing about the picture.
FLAT = 2 * LOOKS_THE_SAME


def conflicting(pairs: Sequence[tuple[Labelled, str]], config: DataSection) -> dict[str, str]:
    """Map the id of each example that shares its digest with an example of another label to the reason to exclude it.

    Unusable images have an empty digest and never match.

    Raises:
        UserError: there are such examples and `config.on_conflict` is not skip; all are named.
    """
    same: dict[str, list[Labelled]] = {}
    for example, digest in pairs:
        if digest:
            same.setdefault(digest, []).append(example)
    groups = [group for group in same.values() if len({example.label for example in group}) > 1]
    if groups and config.on_conflict == "error":
        # Name all of them, however many: the user has to look at each.
        lines = [" and ".join(f"{e.example_id} ({e.label!r})" for e in group) for group in groups]
        several = "the same picture has two labels" + (f", {len(groups)} times" if groups[1:] else "")
        raise UserError(
            f"{several}; remove the wrong ones, or set data.on_conflict=skip to leave all of them out:\n"
            + "\n".join(f"  {shown(line)}" for line in lines)
        )
    return {example.example_id: _other(example, group) for group in groups for example in group}


def _other(example: Labelled, group: list[Labelled]) -> str:
    other = next(one for one in group if one.label != example.label)
    return f"the same picture as {other.example_id}, whose label is {other.label!r}"


def near_copies(dataset: FewShotDataset) -> list[tuple[str, str]]:
    """Pairs of "split: id" from different splits that show the same picture, re-encoded or rescaled."""
    named = [(split, example) for split, examples in dataset.splits.items() for example in examples]
    if not named:
        return []
    looked_at = with_progress(named, "looking for pictures on both sides of a split")
    small = np.stack([small_copy(dataset.image(example)) for _, example in looked_at])  # [images, SIDE * SIDE * 3]
    first = {"train": 0, "validation": len(dataset.train), "test": len(dataset.train) + len(dataset.validation)}
    squares = np.square(small).sum(axis=1)
    pairs = []
    for index, (split, example) in enumerate(named):
        earlier = small[: first[split]]  # the images of the preceding splits
        if not len(earlier) or is_flat(small[index]):
            continue
        distances = (squares[: first[split]] + squares[index] - 2 * earlier @ small[index]) / small.shape[1]
        nearest = int(distances.argmin())
        if distances[nearest] <= LOOKS_THE_SAME**2:
            other_split, other = named[nearest]
            pairs.append((f"{other_split}: {other.example_id}", f"{split}: {example.example_id}"))
    return pairs


def near_copies_note(dataset: FewShotDataset) -> list[str]:
    """A note for the user about near copies across splits; an empty list if there are none."""
    pairs = near_copies(dataset)
    if not pairs:
        return []
    lines = listing([f"{one} looks like {other}" for one, other in pairs])
    return [
        f"{len(pairs)} image{'s' if pairs[1:] else ''} of one split look the same as one of another, scaled or encoded "
        f"otherwise; the accuracy on them proves little. Remove one of each two:\n{lines}"
    ]


def small_copy(data: bytes) -> np.ndarray:
    """The picture scaled to [SIDE * SIDE * 3] grey levels. JPEG is decoded at an eighth of its size, for speed."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format == "JPEG":
        image.draft("RGB", (4 * SIDE, 4 * SIDE))
        picture = upright(image).convert("RGB")
    else:
        picture = open_image(data)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32).ravel()


def is_flat(small: np.ndarray) -> bool:
    return float(small.reshape(-1, 3).std(axis=0).max()) < FLAT
