"""What the small model asks of a data set, without torch: a dry-run looks at it first."""

import re
from collections.abc import Sequence

from rft_cluster.common.errors import UserError

FEWEST = 12  # images to sort into groups
PIECES = r"</?[A-Za-z_]+>|\n+|[^<\n]+|<"  # its tokenizer cuts text there; a piece becomes one token
CURE = "or set model.path to a trained Qwen2-VL"


def check_conditions(images: int, class_names: Sequence[str]) -> None:
    """Can a small model be built for `images` images outside validation and test, and these classes?

    Raises:
        UserError: too few images, or a class's name cannot be one token.
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
