"""A few-shot data set, and how one is cut from labelled images.

    each class's images, shuffled by (seed, class):

    rose    | shots |  ...  unused  ...  | held out |     front: train
    tulip   | shots |  ...  unused  ...  | held out |     back: dealt out to validation and test
            '--------------- pool -------'

Training images are taken from the front and held-out ones from the back, so that runs with 1, 2, 4 or 8 shots
and one seed share their test images (as long as no class runs short) and their training images are nested.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rft_cluster.config import DataSection
from rft_cluster.data.images import check_image
from rft_cluster.errors import UserError
from rft_cluster.messages import Example
from rft_cluster.rewards.accuracy import normalise_label

LISTED = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FewShotDataset:
    """Disjoint splits of a data set.

    `validation` is for curves and choices, `test` only for the figures before and after training. `pool`
    holds encoded images outside those two without labels: the training images, and all others where the source
    has read them. `problem` is the question that a data set brings along, where it does.
    """

    name: str
    classes: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    pool: list[bytes]
    problem: str | None = None

    def batch(self, seed: int, step: int, size: int) -> list[Example]:
        """The step's `size` training examples; the same for the same arguments, so resuming needs no state.

        Batches follow one another over seeded permutations of `train`: each epoch holds each image once,
        whether or not a step crosses its end, and a batch may be larger than `train`.
        """
        orders: dict[int, np.ndarray] = {}
        batch = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, len(self.train))
            if epoch not in orders:
                orders[epoch] = seeded_generator(seed, "epoch", epoch).permutation(len(self.train))
            batch.append(self.train[orders[epoch][index]])
        return batch


def few_shot_split(
    name: str,
    examples: list[Example],
    classes: list[str],
    config: DataSection,
    seed: int,
    digests: list[str] | None = None,
) -> FewShotDataset:
    """Cut labelled examples into a `FewShotDataset`; deterministic in its arguments.

    Train gets `config.shots` images of each class. Validation and test take equally many of each class from
    the rest, as far as the classes reach, and share each class in proportion to their sizes. Of equal
    pictures only the first is kept, so none can be on both sides. `digests` are the images' digests from
    `check_image`, for a caller that has them.

    Raises:
        UserError: an image cannot be read, a picture has two labels, a class has too few images for the
            shots, or too few images are left for validation and test.
        KeyError: an example's label is not one of `classes`.
    """
    if digests is None:
        digests = [check_image(example.image, example.example_id) for example in examples]
    different = _without_duplicates(examples, digests)
    by_class: dict[str, list[Example]] = {label: [] for label in classes}
    for example in different:
        by_class[example.label].append(example)
    _check_shots(by_class, config.shots)

    shuffled = {
        label: [members[i] for i in seeded_generator(seed, "class", label).permutation(len(members))]
        for label, members in by_class.items()
    }
    train = [example for members in shuffled.values() for example in members[: config.shots]]
    left = {label: members[config.shots :][::-1] for label, members in shuffled.items()}
    _check_held_out(sum(map(len, left.values())), config, len(classes))

    held_out = _round_robin(left, config.validation + config.test, seed)
    test, validation = _deal(held_out, config.test)
    outside = {e.example_id for e in held_out}
    pool = [e.image for e in different if e.example_id not in outside]
    return FewShotDataset(name, list(classes), train, validation, test, pool)


def read_examples(examples: list[Example], read: Callable[[str], bytes], where: str) -> list[Example]:
    """The examples with their images, which `read` gives by example id; for those chosen by ids and digests alone.

    Raises:
        UserError: images cannot be read (`read` may raise OSError or UserError) or decoded; all are named.
    """
    complete, problems = [], []
    for example in examples:
        try:
            image = read(example.example_id)
            check_image(image, example.example_id)
        except OSError as error:
            problems.append(f"{example.example_id}: {error.strerror or error}")
        except UserError as error:
            problems.append(str(error))
        else:
            complete.append(replace(example, image=image))
    if problems:
        raise UserError(
            f"{len(problems)} of the {len(examples)} images chosen from {where} cannot be used; mend or replace "
            f"them:\n{listing(problems)}"
        )
    return complete


def check_classes(found: list[str], wanted: list[str] | None) -> list[str]:
    """The label set of a source that holds the classes `found`, in the order of `wanted` if that is given.

    Raises:
        UserError: `data.classes` and the source differ, or the labels will not do (see `check_labels`).
    """
    if wanted is not None:
        unlisted = sorted(set(found) - set(wanted))
        absent = sorted(set(wanted) - set(found))
        if unlisted or absent:
            problems = [f"{label!r} has images but is not in data.classes" for label in unlisted]
            problems += [f"{label!r} is in data.classes but has no images" for label in absent]
            raise UserError(f"data.classes does not match the data; make them agree:\n{listing(problems)}")
    classes = found if wanted is None else wanted
    check_labels(classes)
    return classes


def check_labels(classes: list[str]) -> None:
    """Refuse a label set in which answers cannot be told apart.

    Raises:
        UserError: fewer than two classes, a label without any letter, digit or symbol, or two labels that are
            the same once case, spaces, hyphens, underscores and punctuation are set aside.
    """
    if len(classes) < 2:
        raise UserError(f"a data set needs at least two classes, got {classes!r}")
    seen: dict[str, str] = {}
    for label in classes:
        key = normalise_label(label)
        if not key:
            raise UserError(f"class {label!r} has no letter, digit or symbol, so no answer could match it: rename it")
        if key in seen:
            raise UserError(
                f"classes {seen[key]!r} and {label!r} are the same answer: case, spaces, hyphens, "
                f"underscores and punctuation do not count. Merge or rename one of them"
            )
        seen[key] = label


def listing(lines: list[str]) -> str:
    """The lines, indented; from the 21st on only their number."""
    rest = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:LISTED], *rest])


def seeded_generator(*parts: int | str) -> np.random.Generator:
    """A random generator of its own for each combination of parts, the same in every process."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _without_duplicates(examples: list[Example], digests: list[str]) -> list[Example]:
    first: dict[str, Example] = {}
    conflicts = []
    for example, digest in zip(examples, digests, strict=True):
        kept = first.setdefault(digest, example)
        if kept.label != example.label:
            conflicts.append(f"{kept.example_id} ({kept.label!r}) and {example.example_id} ({example.label!r})")
    if conflicts:
        raise UserError(f"the same picture has two labels; remove the wrong one:\n{listing(conflicts)}")
    if len(first) < len(examples):
        logger.warning("left out %d of %d images: copies of others", len(examples) - len(first), len(examples))
    return list(first.values())


def _check_shots(by_class: dict[str, list[Example]], shots: int) -> None:
    short = [f"{label!r}: {len(members)}" for label, members in by_class.items() if len(members) < shots]
    if short:
        fewest = min(map(len, by_class.values()))
        cure = f"Add images or set data.shots={fewest}" if fewest else "Add images"
        # Every short class is named, however many: they are what the user has to collect images for.
        lines = "\n".join(f"  {line}" for line in short)
        raise UserError(f"data.shots is {shots}, but these classes have fewer different images. {cure}:\n{lines}")


def _check_held_out(left: int, config: DataSection, classes: int) -> None:
    wanted = config.validation + config.test
    if left >= wanted:
        return
    test = left * config.test // wanted
    fitting = f"set data.validation={left - test} data.test={test}"
    cure = f"Add images, or {fitting}" if test else "Add images, or lower data.shots"
    raise UserError(
        f"data.validation ({config.validation}) and data.test ({config.test}) ask for {wanted} images, but "
        f"{left} are left after {config.shots} shots of each of {classes} classes. {cure}"
    )


def _round_robin(left: dict[str, list[Example]], count: int, seed: int) -> list[Example]:
    """`count` examples, one of each class in turn, grouped by class. The seed decides a partial turn."""
    labels = list(left)
    taken: Counter[str] = Counter()
    turn = 0
    while taken.total() < count:
        able = [label for label in labels if len(left[label]) > turn]
        missing = count - taken.total()
        if missing < len(able):
            chosen = seeded_generator(seed, "last turn").permutation(len(able))[:missing]
            able = [able[i] for i in chosen]
        taken.update(able)
        turn += 1
    return [example for label in labels for example in left[label][: taken[label]]]


def _deal(examples: list[Example], first: int) -> tuple[list[Example], list[Example]]:
    """Split into `first` examples and the others by even steps, so any run is shared in that proportion."""
    n = len(examples)
    is_first = [(i + 1) * first // n > i * first // n for i in range(n)]
    return (
        [e for e, chosen in zip(examples, is_first, strict=True) if chosen],
        [e for e, chosen in zip(examples, is_first, strict=True) if not chosen],
    )
