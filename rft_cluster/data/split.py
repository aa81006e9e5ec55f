"""Cut few-shot splits from labelled images.

    each class's images, shuffled by (seed, class):

    rose    | shots |  ...  unused  ...  | held out |     front: train
    tulip   | shots |  ...  unused  ...  | held out |     back: validation and test
            '--------------- pool -------'

Training images are taken from the front and held-out ones from the back, so that runs with 1, 2, 4 or 8 shots
and one seed share their test images (as long as no class runs short) and their training images are nested.
A class of `data.unseen_classes` that has too few images for the shots gives all of them to the test.

With `data.manifest` nothing is drawn: the images that an earlier run's manifest names are taken, in its order.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.config import AlsoSection, DataSection
from rft_cluster.data.conflicts import conflicting
from rft_cluster.data.dataset import (
    FewShotDataset,
    LabelledImage,
    check_labelled,
    composed,
    listing,
    seeded_generator,
)
from rft_cluster.data.lazy import LazyImages, Pool
from rft_cluster.data.manifest import read_manifest
from rft_cluster.data.names import chosen_names, name_notes
from rft_cluster.data.reading import Labelled, Seen, look_at, pixels_of, read_again, skip_or_refuse


@dataclass(frozen=True)
class Chosen:
    """Examples by split. `pool`: all but the held-out ones."""

    train: list[Labelled]
    validation: list[Labelled]
    test: list[Labelled]
    pool: list[Labelled]
    copies: dict[str, str]

    @property
    def splits(self) -> tuple[list[Labelled], list[Labelled], list[Labelled]]:
        return self.train, self.validation, self.test


def few_shot_split(
    name: str, examples: Sequence[LabelledImage], classes: list[str], config: DataSection, seed: int
) -> FewShotDataset:
    """Cut labelled images into a `FewShotDataset`; deterministic in its arguments.

    Train gets `config.shots` images of each class. Validation and test take equally many of each class from
    the rest, as far as the classes reach, and share each class in proportion to their sizes. Only the first of equal
    pictures is kept, so no picture is in two splits. With `config.manifest` the splits are the manifest's instead.
    `config.only` and `config.strip_prefix` are applied.

    Raises:
        UserError: images cannot be read (unless `config.on_bad_image` is skip), a picture has two labels (unless
            `config.on_conflict` is skip), a class has too few images for the shots and is not in
            `config.unseen_classes`, or too few images are left for validation and test.
        KeyError: an example's label is not one of `classes`.
        TypeError: `examples` is not a list of `LabelledImage`.
    """
    check_labelled("examples", examples)
    twice = [example_id for example_id, count in Counter(e.example_id for e in examples).items() if count > 1]
    if twice:
        raise UserError(f"{name} has several images of one id; give each its own:\n{listing(twice)}")
    # Labels outside `classes` stay in, so that they raise KeyError below instead of vanishing.
    names = chosen_names(classes, config)
    wanted = [
        Labelled(e.example_id, names.get(e.label, e.label), e.aliases)
        for e in examples
        if e.label in names or e.label not in classes
    ]
    # Decode every image before the draw: digests find duplicates, and bad images must not be drawn.
    images = {example.example_id: example.image for example in examples}
    seen, skipped = look_at(wanted, images.__getitem__, config)
    skip_or_refuse(skipped, f"{len(wanted)} images of {name}", config)
    digests = pixels_of(wanted, seen)
    # A picture with two labels would teach one and be tested on the other: both copies are excluded.
    skipped |= conflicting(list(zip(wanted, digests, strict=True)), config)
    kept = list(names.values())
    chosen = choose(wanted, digests, skipped, kept, config, seed)
    dataset = dataset_of(name, kept, chosen, seen, images.__getitem__, skipped)
    return replace(dataset, remarks=name_notes(classes, names))


def dataset_of(
    name: str,
    classes: list[str],
    chosen: Chosen,
    seen: Mapping[str, Seen],
    read: Callable[[str], bytes],
    skipped: dict[str, str],
) -> FewShotDataset:
    """Make a data set of the chosen splits. It reads images on access, with `read(example_id)`.

    `seen`: example id -> digests of the chosen images.
    """
    train, validation, test = ([e.example(seen[e.example_id].sha256) for e in split] for split in chosen.splits)
    examples = (*train, *validation, *test)
    images = LazyImages({e.image.sha256: partial(read_again, e.example_id, e.image.sha256, read) for e in examples})
    # The pool gives pictures without labels. It includes the training images but none that is held out.
    pool = Pool([e.example_id for e in chosen.pool], read)
    whole_pixels = {e.image.sha256: seen[e.example_id].pixels for e in examples}
    return FewShotDataset(
        name, classes, train, validation, test, pool, images, whole_pixels, skipped=skipped, copies=chosen.copies
    )


def choose(
    examples: list[Labelled],
    digests: list[str],
    skipped: Collection[str],
    classes: list[str],
    config: DataSection,
    seed: int,
) -> Chosen:
    """Choose the splits. Equal `digests` mark equal images; ids in `skipped` are excluded. Images are not read."""
    usable = [(e, digest) for e, digest in zip(examples, digests, strict=True) if e.example_id not in skipped]
    earlier = read_manifest(config.manifest) if config.manifest else {}
    named, left_out = earlier.get("splits", {}), earlier.get("left_out", ())
    preferred = {entry["id"] for split in named.values() for entry in split}
    different, copies = _without_duplicates(usable, preferred)
    if named:
        by_id = {example.example_id: example for example in different}
        train, validation, test = (
            [by_id[entry["id"]] for entry in named[split] if entry["id"] in by_id]
            for split in ("train", "validation", "test")
        )
    else:
        lost = Counter(example.label for example in examples if example.example_id in skipped)
        draw = _draw_fold if config.fold else _draw
        train, validation, test = draw(different, classes, lost, config, seed)
    outside = {*left_out, *(example.example_id for example in (*validation, *test))}
    pool = [example for example in different if example.example_id not in outside]
    return Chosen(train, validation, test, pool, copies)


def _without_duplicates(
    usable: list[tuple[Labelled, str]], preferred: set[str]
) -> tuple[list[Labelled], dict[str, str]]:
    """Keep one example per digest: the first preferred one if there is any, else the first.

    Also maps the id of each dropped example to the id of the kept one.
    """
    first: dict[str, Labelled] = {}
    for example, digest in usable:
        if digest not in first or (example.example_id in preferred and first[digest].example_id not in preferred):
            first[digest] = example
    copies = {
        example.example_id: first[digest].example_id for example, digest in usable if first[digest] is not example
    }
    return [example for example, _ in usable if example.example_id not in copies], copies


def _draw(
    different: list[Labelled], classes: list[str], lost: Counter[str], config: DataSection, seed: int
) -> tuple[list[Labelled], list[Labelled], list[Labelled]]:
    """Draw train, validation and test. `lost` counts each class's skipped images, for the messages.

    An unseen class is drawn as if it were trained, so that the test images are those of a run that trains it. One with
    fewer images than the shots could not be trained: all its images are tested, beyond `config.test`, and the other
    classes are drawn as if it were not there.
    """
    shuffled = _shuffled(different, classes, seed)
    unseen = set(map(composed, config.unseen_classes))
    alone = {label: shuffled.pop(label) for label in classes if label in unseen and len(shuffled[label]) < config.shots}
    _check_shots(shuffled, lost, config.shots)
    train = [example for members in shuffled.values() for example in members[: config.shots]]
    left = {label: members[config.shots :][::-1] for label, members in shuffled.items()}
    _check_held_out(shuffled, lost.total(), config)
    test, validation = _split_evenly(_round_robin(left, config.validation + config.test, seed), config.test)
    if config.test:  # 0 where the test has images of its own
        test += [example for members in alone.values() for example in members]
    return train, validation, test


def _draw_fold(
    different: list[Labelled], classes: list[str], lost: Counter[str], config: DataSection, seed: int
) -> tuple[list[Labelled], list[Labelled], list[Labelled]]:
    """Draw the splits of cross-validation: test is fold `config.fold`, train and validation come from the rest.

    Images go to the folds in turn, class after class without a restart, so fold sizes differ by at most one.
    """
    shuffled = _shuffled(different, classes, seed)
    ordered = [example for members in shuffled.values() for example in members]
    test = ordered[config.fold - 1 :: config.folds]
    tested = {example.example_id for example in test}
    left = {label: [e for e in members if e.example_id not in tested] for label, members in shuffled.items()}
    short = [f"{label!r}: {len(members)}" for label, members in left.items() if len(members) < config.shots]
    if short or not test:
        fewest = min(map(len, left.values()))
        cure = f", or set data.shots={fewest}" if fewest else ""
        lines = "\n".join(f"  {shown(line)}" for line in short)
        raise UserError(
            f"data.folds is {config.folds}: outside the test images of fold {config.fold} these classes have fewer "
            f"different images than data.shots ({config.shots}). Add images{cure}:\n{lines}"
        )
    train = [example for members in left.values() for example in members[: config.shots]]
    others = {label: members[config.shots :][::-1] for label, members in left.items()}
    wanted = min(config.validation, sum(map(len, others.values())))
    return train, _round_robin(others, wanted, seed), test


def _shuffled(different: list[Labelled], classes: list[str], seed: int) -> dict[str, list[Labelled]]:
    by_class: dict[str, list[Labelled]] = {label: [] for label in classes}
    for example in different:
        by_class[example.label].append(example)
    return {
        label: [members[i] for i in seeded_generator(seed, "class", label).permutation(len(members))]
        for label, members in by_class.items()
    }


def _check_shots(by_class: dict[str, list[Labelled]], lost: Counter[str], shots: int) -> None:
    short = [
        f"{label!r}: {len(members)}" + (f", and {lost[label]} skipped that cannot be used" if lost[label] else "")
        for label, members in by_class.items()
        if len(members) < shots
    ]
    if short:
        fewest = min(map(len, by_class.values()))
        cure = f"Add images or set data.shots={fewest}" if fewest else "Add images"
        # Name every short class, however many: the user has to collect images for each.
        lines = "\n".join(f"  {shown(line)}" for line in short)
        raise UserError(f"data.shots is {shots}, but these classes have fewer different images. {cure}:\n{lines}")


def _check_held_out(by_class: dict[str, list[Labelled]], lost: int, config: DataSection) -> None:
    classes, images = len(by_class), sum(map(len, by_class.values()))
    left, wanted = images - config.shots * classes, config.validation + config.test
    if left >= wanted:
        return
    test = min(config.test, max(1, left * config.test // wanted))  # at least one if any is wanted
    fitting = {"validation": left - test, "test": test}
    cures = ["add images"]
    if left > 0:
        asked = {"validation": config.validation, "test": config.test}
        cures.append("set " + " ".join(f"data.{key}={number}" for key, number in fitting.items() if asked[key]))
    trains = config.shots and not isinstance(config, AlsoSection)
    folds = None if config.unseen_classes else _fitting_folds(by_class, config.shots)  # they do not go together
    if folds and config.test and trains:
        cures.append(
            f"test every image in turn, in {folds} trainings one after the other: the same command with "
            f"data.folds={folds}"
        )
    if left <= 0 and trains:
        cures.append("lower data.shots")
    after = f" after {config.shots} shots of each of {classes} classes" if config.shots else " in the set's own"
    raise UserError(
        f"data.validation ({config.validation}) and data.test ({config.test}) ask for {wanted} images, but "
        f"{left} are left{after}"
        f"{f' and without the {lost} skipped that cannot be used' if lost else ''}; do one of these:\n{listing(cures)}"
    )


def _fitting_folds(by_class: dict[str, list[Labelled]], shots: int) -> int | None:
    """5 or 10, the smaller number of folds that leaves every class its shots to train on; None if neither does."""
    for folds in (5, 10):
        if all(len(members) - -(-len(members) // folds) >= shots for members in by_class.values()):
            return folds
    return None


def _round_robin(left: dict[str, list[Labelled]], count: int, seed: int) -> list[Labelled]:
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


def _split_evenly(examples: list[Labelled], first: int) -> tuple[list[Labelled], list[Labelled]]:
    """Split into `first` examples and the others in even steps, so that every stretch keeps that proportion."""
    n = len(examples)
    is_first = [(i + 1) * first // n > i * first // n for i in range(n)]
    return (
        [e for e, chosen in zip(examples, is_first, strict=True) if chosen],
        [e for e, chosen in zip(examples, is_first, strict=True) if not chosen],
    )
