"""The tiny model's version, and its conditions on a data set. Imports no torch: a dry-run can check them first."""

import re
from collections.abc import Sequence

from rft_cluster.common.errors import UserError

RECIPE_VERSION = 3  # part of the cache key: increase it with every change of the built model
FEWEST = 12  # images
WINDOW = 2048  # tokens of a prompt and its completion
PIECES = r"</?[A-Za-z_]+>|\n+|[^<\n]+|<"  # the tokenizer cuts text into these; each becomes one token
CURE = "or set model.path to a trained Qwen2-VL"


def check_conditions(images: int, class_names: Sequence[str]) -> None:
    """Check that a tiny model can be built from `images` images (outside validation and test) for these classes.

    Raises:
        UserError: there are too few images, or a class name cannot be one token.
    """
    if images < FEWEST:
        raise UserError(
            f"model.path is tiny: it learns to see from images outside validation and test, at least {FEWEST}, and "
            f"{images} are left: lower data.validation or data.test, add images, {CURE}"
        )
    for name in class_names:
        if not re.fullmatch(PIECES, name):
            raise UserError(
                f"model.path is tiny, whose answers are one token, and class {name!r} cannot be one ('<' and line ends "
                f"are cut apart): rename the class, {CURE}"
            )
