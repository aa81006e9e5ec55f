"""Random changes of training images (`data.augment`): crop, flip, rotation, colour.

The driver draws them, as numbers; generators and learners apply them to the decoded image, so all see the same pixels.
An image keeps its size, so the lengths of prompts that were checked before training hold.
"""

import numpy as np
from PIL import Image, ImageEnhance

from rft_cluster.config.data import AugmentSection
from rft_cluster.messages import Augmentation

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def draw(augment: AugmentSection, random: np.random.Generator) -> Augmentation | None:
    """Draw the changes of one image; None if none is switched on.

    The same numbers are drawn whichever are switched on, so switching one on does not change the others.
    """
    if augment == AugmentSection():
        return None
    width, height, left, top, side, turn, *colour = (float(one) for one in random.random(9))
    kept = (1 - augment.crop * width, 1 - augment.crop * height)
    corner = (left * (1 - kept[0]), top * (1 - kept[1]))
    return Augmentation(
        crop=(*corner, corner[0] + kept[0], corner[1] + kept[1]),
        flip=augment.flip and side < 0.5,
        rotation=augment.rotation * (2 * turn - 1),
        colour=(_factor(colour[0], augment), _factor(colour[1], augment), _factor(colour[2], augment)),
    )


def _factor(drawn: float, augment: AugmentSection) -> float:
    return 1 + augment.colour * (2 * drawn - 1)


def augmented(image: Image.Image, how: Augmentation | None) -> Image.Image:
    """The changed image, RGB, of the same size."""
    if how is None:
        return image
    if how.rotation:
        image = image.rotate(how.rotation, Image.Resampling.BICUBIC, fillcolor=_edge(image))
    left, top, right, bottom = how.crop
    if how.crop != (0, 0, 1, 1):
        width, height = image.size
        box = (left * width, top * height, min(right, 1) * width, min(bottom, 1) * height)
        image = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
    if how.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhancer, factor in zip(ENHANCERS, how.colour, strict=True):
        if factor != 1:
            image = enhancer(image).enhance(factor)
    return image


def _edge(image: Image.Image) -> tuple[int, int, int]:
    """The mean colour of an image's outermost pixels."""
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (round(float(one)) for one in edge.mean(0))
    return red, green, blue
