"""How few-shot splits are cut from labelled images.

    each class's images, shuffled by (seed, class):

    rose    | shots |  ...  unused  ...  | held out |     front: train
    tulip   | shots |  ...  unused  ...  | held out |     back: dealt out to validation and test
            '--------------- pool -------'

Training images are taken from the front and held-out ones from the back, so that runs with 1, 2, 4 or 8 shots
and one seed share their test images (as long as no class runs short) and their training images are nested.

With `data.manifest` nothing is drawn: the images that an earlier run's manifest names are taken, in its order.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import FewShotDataset, listing, seeded_generator
from rft_cluster.data.images import check_image
from rft_cluster.data.manifest import read_manifest
from rft_cluster.messages import Example


@dataclass(frozen=True)
class Unread:
    """Labelled images of which only the chosen are to be decoded: `read` gives one by its example id."""

    examples: list[Example]
    """Without their images."""
    digests: list[str]
    """Equal for byte-equal images."""
    read: Callable[[str], bytes]
    where: str
    """For the messages."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Those already known to be of no use, by id with the reason."""

    def without(self, ids: Collection[str]) -> "Unread":
        kept = [(e, digest) for e, digest in zip(self.examples, self.digests, strict=True) if e.example_id not in ids]
        return replace(self, examples=[e for e, _ in kept], digests=[digest for _, digest in kept])


def few_shot_split(
    name: str,
    examples: list[Example],
    classes: list[str],
    config: DataSection,
    seed: int,
    digests: list[str] | None = None,
    skipped: dict[str, str] | None = None,
) -> FewShotDataset:
    """Cut labelled examples into a `FewShotDataset`; deterministic in its arguments.

    Train gets `config.shots` images of each class. Validation and test take equally many of each class from
    the rest, as far as the classes reach, and share each class in proportion to their sizes. Of equal
    pictures only the first is kept, so none can be on both sides. With `config.manifest` each split gets those of
    the examples that the manifest names for it instead.

    `digests` are the images' digests from `check_image`, for a caller that has them; `skipped` says which of the
    examples cannot be used, with the reason.

    Raises:
        UserError: images cannot be read (unless `config.on_bad_image` is skip), a picture has two labels, a class
            has too few images for the shots, or too few images are left for validation and test.
        KeyError: an example's label is not one of `classes`.
    """
    twice = [example_id for example_id, count in Counter(e.example_id for e in examples).items() if count > 1]
    if twice:
        raise UserError(f"{name} has several images of one id; give each its own:\n{listing(twice)}")
    skipped = dict(skipped or {})
    if digests is None:
        images = {example.example_id: example.image for example in examples}
        examples, digests, bad = read_images(examples, images.__getitem__)
        skip_or_refuse(bad, f"{len(examples)} images of {name}", config)
        skipped |= bad
    usable = [(e, digest) for e, digest in zip(examples, digests, strict=True) if e.example_id not in skipped]
    named = read_manifest(config.manifest)["splits"] if config.manifest else {}
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
        train, validation, test = _draw(different, classes, lost, config, seed)
    outside = {example.example_id for example in (*validation, *test)}
    pool = [example.image for example in different if example.example_id not in outside]
    return FewShotDataset(name, list(classes), train, validation, test, pool, None, skipped, copies)


def split_and_read(name: str, images: Unread, classes: list[str], config: DataSection, seed: int) -> FewShotDataset:
    """`few_shot_split` that decodes the chosen images only; the pool holds the training images only.

    A bad one is left out, if `config.on_bad_image` is skip, and the choice drawn again from the others, until all
    that are chosen are good.

    Raises:
        UserError: as `few_shot_split`.
    """
    skipped = dict(images.skipped)
    good: dict[str, Example] = {}
    while True:
        chosen = few_shot_split(name, images.examples, classes, config, seed, images.digests, skipped)
        new = [e for split in chosen.splits.values() for e in split if e.example_id not in good]
        complete, _, bad = read_images(new, images.read)
        skip_or_refuse(bad, f"{len(new)} images chosen from {images.where}", config)
        good |= {example.example_id: example for example in complete}
        skipped |= bad
        if not bad:
            break
    train, validation, test = ([good[e.example_id] for e in split] for split in chosen.splits.values())
    return replace(chosen, train=train, validation=validation, test=test, pool=[example.image for example in train])


def training_only(config: DataSection) -> DataSection:
    """For a source whose held-out images lie apart: a split of its other images, with all of those in the pool."""
    return config.model_copy(update={"validation": 0, "test": 0})


def held_out_only(config: DataSection) -> DataSection:
    """For the held-out images of such a source: validation and test alone, no shots are set aside."""
    return config.model_copy(update={"shots": 0})


def copies_of(
    known: list[Example], known_digests: list[str], examples: list[Example], digests: list[str]
) -> dict[str, str]:
    """Ids of the examples whose digest one of `known` has, too, with the id of the known one. An empty digest is of an
    image that cannot be used, and equals none.

    Raises:
        UserError: a picture has two labels.
    """
    kept = dict(zip(reversed(known_digests), reversed(known), strict=True))  # of several, the first
    pairs = [(kept[digest], e) for e, digest in zip(examples, digests, strict=True) if digest and digest in kept]
    _check_one_label(pairs)
    return {example.example_id: one.example_id for one, example in pairs}


def read_images(
    examples: list[Example], read: Callable[[str], bytes]
) -> tuple[list[Example], list[str], dict[str, str]]:
    """The examples with their images, which `read` gives by example id, and the images' digests.

    Third are the ids of those that cannot be used, with the reason: `read` or `check_image` refused them (OSError or
    UserError). They have no image and an empty digest.
    """
    complete, digests, bad = [], [], {}
    for example in examples:
        image, digest = b"", ""
        try:
            data = read(example.example_id)
            digest = check_image(data, example.example_id)
            image = data
        except OSError as error:
            bad[example.example_id] = error.strerror or str(error)
        except UserError as error:
            bad[example.example_id] = str(error).removeprefix(f"{example.example_id}: ")
        complete.append(replace(example, image=image))
        digests.append(digest)
    return complete, digests, bad


def skip_or_refuse(bad: dict[str, str], of: str, config: DataSection) -> None:
    """Raises:
    UserError: there are bad images and `config.on_bad_image` is not skip; all are named.
    """
    if bad and config.on_bad_image == "error":
        raise UserError(
            f"{len(bad)} of the {of} cannot be used; mend or remove them, or set data.on_bad_image=skip:\n"
            f"{listing([f'{example_id}: {reason}' for example_id, reason in bad.items()])}"
        )


def _without_duplicates(usable: list[tuple[Example, str]], preferred: set[str]) -> tuple[list[Example], dict[str, str]]:
    """Of each digest the first example, or the first that is preferred; and the others' ids with that one's."""
    first: dict[str, Example] = {}
    for example, digest in usable:
        if digest not in first or (example.example_id in preferred and first[digest].example_id not in preferred):
            first[digest] = example
    pairs = [(first[digest], example) for example, digest in usable if first[digest] is not example]
    _check_one_label(pairs)
    copies = {example.example_id: kept.example_id for kept, example in pairs}
    return [example for example, _ in usable if example.example_id not in copies], copies


def _check_one_label(pairs: list[tuple[Example, Example]]) -> None:
    conflicts = [
        f"{one.example_id} ({one.label!r}) and {other.example_id} ({other.label!r})"
        for one, other in pairs
        if one.label != other.label
    ]
    if conflicts:
        raise UserError(f"the same picture has two labels; remove the wrong one:\n{listing(conflicts)}")


def _draw(
    different: list[Example], classes: list[str], lost: Counter[str], config: DataSection, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Train, validation and test. `lost` counts each class's images that were skipped, for the messages."""
    by_class: dict[str, list[Example]] = {label: [] for label in classes}
    for example in different:
        by_class[example.label].append(example)
    _check_shots(by_class, lost, config.shots)
    shuffled = {
        label: [members[i] for i in seeded_generator(seed, "class", label).permutation(len(members))]
        for label, members in by_class.items()
    }
    train = [example for members in shuffled.values() for example in members[: config.shots]]
    left = {label: members[config.shots :][::-1] for label, members in shuffled.items()}
    _check_held_out(sum(map(len, left.values())), lost.total(), config, len(classes))
    test, validation = _deal(_round_robin(left, config.validation + config.test, seed), config.test)
    return train, validation, test


def _check_shots(by_class: dict[str, list[Example]], lost: Counter[str], shots: int) -> None:
    short = [
        f"{label!r}: {len(members)}" + (f", and {lost[label]} skipped that cannot be used" if lost[label] else "")
        for label, members in by_class.items()
        if len(members) < shots
    ]
    if short:
        fewest = min(map(len, by_class.values()))
        cure = f"Add images or set data.shots={fewest}" if fewest else "Add images"
        # Every short class is named, however many: they are what the user has to collect images for.
        lines = "\n".join(f"  {shown(line)}" for line in short)
        raise UserError(f"data.shots is {shots}, but these classes have fewer different images. {cure}:\n{lines}")


def _check_held_out(left: int, lost: int, config: DataSection, classes: int) -> None:
    wanted = config.validation + config.test
    if left >= wanted:
        return
    test = left * config.test // wanted
    fitting = f"set data.validation={left - test} data.test={test}"
    cure = f"Add images, or {fitting}" if test else "Add images, or lower data.shots"
    raise UserError(
        f"data.validation ({config.validation}) and data.test ({config.test}) ask for {wanted} images, but "
        f"{left} are left after {config.shots} shots of each of {classes} classes"
        f"{f' and without the {lost} skipped that cannot be used' if lost else ''}. {cure}"
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
