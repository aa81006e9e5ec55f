"""The type of a few-shot data set, and the checks of its labels. `split.py` makes one from labelled images."""

import hashlib
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rft_cluster.common.errors import UserError
from rft_cluster.common.labels import extract_answer, normalise_label
from rft_cluster.common.lookup import nearest
from rft_cluster.common.text import shown, shown_lines
from rft_cluster.config.data import AugmentSection
from rft_cluster.data.augment import draw
from rft_cluster.data.images import image_sha256, open_image, pixel_digest
from rft_cluster.data.lazy import LazyImages
from rft_cluster.messages import Example, ImageRef

LISTED = 40
# A block needs its end, but <think> and <answer> also count alone: <NA> may be a class, </label> not.
TAG = re.compile(r"</\s*[A-Za-z][^<>]*>|<\s*(?:think|answer)(?:\s[^<>]*)?>", re.IGNORECASE)
UNSURE, NO_CLASS = "unsure", "(no class)"  # what predictions and confusion matrices say in place of a class
RENAME = "Rename it: its folder, or its name in the table or in data.classes"


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A labelled image from a user's own source, e.g. `LabelledImage("rose/a.jpg", JPEG, "rose")`.

    `image`: the encoded bytes. `example_id`: unique in the data set.

    Raises:
        TypeError: a field has another type.
    """

    example_id: str
    image: bytes
    label: str
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("example_id", str), ("image", bytes), ("label", str), ("aliases", tuple)):
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} of a LabelledImage must be {kind.__name__}, not {reprlib.repr(value)}")

    def example(self) -> Example:
        return Example(ImageRef(self.example_id, image_sha256(self.image)), self.label, self.aliases)


def check_labelled(name: str, images: object) -> None:
    """Raise TypeError if `images`, called `name` in the message, is not a list of `LabelledImage`."""
    if not isinstance(images, list | tuple) or not all(isinstance(one, LabelledImage) for one in images):
        raise TypeError(f"{name} must be a list of LabelledImage, not {reprlib.repr(images)}")


@dataclass(frozen=True, slots=True)
class FewShotDataset:
    """Disjoint splits of a data set. A user's own source makes one with `few_shot_split` or `of`.

    `images`: the encoded images of all splits by `ImageRef.sha256`. A source returns them unread; `load_dataset`
    returns them in memory, at about the model's own size.
    `whole_pixels`: by the same key, the digest of the picture at full size, where a source knows it.
    `validation`: for curves and for choosing a checkpoint. `test`: for the figures before and after training only.
    `pool`: encoded images outside those two, without labels, read on access; some may turn out not to decode.
    `problems`: the distinct questions that come with the data set, if any.
    `skipped`: maps the id of each unusable image to the reason.
    `copies`: maps the id of each excluded duplicate to the id of the equal image that was kept.
    `left_out`: ids of images that were drawn and are not used (`data.unseen_classes`); they are not in the pool either.
    `remarks`: what else was excluded or read differently than stored.
    `levels`: the values shown as black and white, if there are pictures with 16 bits a channel.
    `augment`: how the images of a batch are changed.
    """

    name: str
    classes: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    pool: Sequence[bytes]
    images: Mapping[str, bytes]
    whole_pixels: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)
    levels: tuple[int, int] | None = None
    augment: AugmentSection = field(default_factory=AugmentSection)

    @classmethod
    def of(
        cls,
        name: str,
        classes: list[str],
        train: Sequence[LabelledImage],
        validation: Sequence[LabelledImage],
        test: Sequence[LabelledImage],
        pool: Sequence[bytes],
    ) -> "FewShotDataset":
        """Make a data set from splits that were chosen elsewhere. `pool` is a list.

        Raises:
            TypeError: a split is not a list of `LabelledImage`.
        """
        for split, images in (("train", train), ("validation", validation), ("test", test)):
            check_labelled(split, images)
        in_train, in_validation, in_test = ([one.example() for one in split] for split in (train, validation, test))
        by_hash = {image_sha256(one.image): one.image for one in (*train, *validation, *test)}
        return cls(name, classes, in_train, in_validation, in_test, pool, by_hash)

    @property
    def unseen(self) -> tuple[str, ...]:
        """The classes without a training image (`data.unseen_classes`), in the order of `classes`."""
        trained = {example.label for example in self.train}
        return tuple(label for label in self.classes if label not in trained)

    @property
    def seen_test(self) -> list[Example]:
        """The test images of classes with training images: a classifier that knows no other can be right on them."""
        unseen = self.unseen
        return [example for example in self.test if example.label not in unseen]

    def image(self, example: Example) -> bytes:
        """The encoded image of an example."""
        return self.images[example.image.sha256]

    def pixels_of(self, example: Example) -> str:
        """The `pixel_digest` of the example's picture at its full size."""
        return self.whole_pixels.get(example.image.sha256) or pixel_digest(open_image(self.image(example)))

    @property
    def splits(self) -> dict[str, list[Example]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def aliases(self) -> dict[str, list[str]]:
        """Other right names, by class."""
        return {e.label: list(e.aliases) for split in self.splits.values() for e in split if e.aliases}

    @property
    def problem(self) -> str | None:
        """The question that comes with the data set, or None.

        Raises:
            UserError: there are several.
        """
        if len(self.problems) > 1:
            raise UserError(
                f"prompt.template is problem, so column problem of {self.name} must ask the same of every image, but "
                f"it holds {len(self.problems)} different texts; make them one, or take another template, e.g. "
                f"prompt.template=think_answer:\n{listing([repr(text) for text in self.problems])}"
            )
        return self.problems[0] if self.problems else None

    def with_held_out(self, other: "FewShotDataset") -> "FewShotDataset":
        """A copy with the validation and test images of `other`, and its `skipped` and `copies`."""
        return replace(
            self,
            validation=[*self.validation, *other.validation],
            test=[*self.test, *other.test],
            images=LazyImages.over(self.images, other.images),
            whole_pixels={**self.whole_pixels, **other.whole_pixels},
            skipped=self.skipped | other.skipped,
            copies=self.copies | other.copies,
        )

    def described(self) -> str:
        """One line: the name, and the numbers of classes and images."""
        return (
            f"{shown(self.name)}: {len(self.classes)} classes, {len(self.train)} images to learn from, "
            f"{len(self.validation)} for validation, {len(self.test)} for the test"
        )

    def notes(self) -> list[str]:
        """Notes for the user about excluded images, of one line or more each; empty if every image is used."""
        notes = [shown_lines(remark) for remark in self.remarks]  # they may have names of files
        if self.copies:
            first, kept = next(iter(self.copies.items()))
            more = "copies of other images (first: " if len(self.copies) > 1 else "copy of another image ("
            notes.append(f"left out {len(self.copies)} {more}{shown(first)} is {shown(kept)})")
        if self.skipped:
            images = f"{len(self.skipped)} image{'s' if len(self.skipped) > 1 else ''}"
            lines = listing([f"{example_id}: {reason}" for example_id, reason in self.skipped.items()])
            notes.append(f"skipped {images} that cannot be used:\n{lines}")
        return notes

    def batch(self, seed: int, step: int, size: int, further: int = 0) -> list[Example]:
        """The `size` training examples of a step, or those of its first, second, ... `further` round of prompts.

        Equal arguments give equal batches, so resuming needs no state.

        Batches run through seeded permutations of `train`, one an epoch: an epoch has each image once, a batch may
        cross the end of an epoch and may be larger than `train`. Further rounds have permutations of their own, so that
        epochs do not depend on how many there were. Each image is to be changed as `augment` says, in a
        way drawn from (seed, step, index in the step).
        """
        of_what, start = (("further", step, further), 0) if further else (("epoch",), step * size)
        orders: dict[int, np.ndarray] = {}
        batch = []
        for place in range(size):
            epoch, index = divmod(start + place, len(self.train))
            if epoch not in orders:
                orders[epoch] = seeded_generator(seed, *of_what, epoch).permutation(len(self.train))
            how = draw(self.augment, seeded_generator(seed, "augment", step, further * size + place))
            batch.append(self.train[orders[epoch][index]].changed(how))
        return batch


def check_classes(found: list[str], wanted: list[str] | None) -> list[str]:
    """The classes `found` (in NFC), in the order of `wanted` if given.

    Raises:
        UserError: `wanted` (`data.classes`) and `found` differ, or `check_labels` refuses the labels.
    """
    if wanted is not None:
        wanted = [composed(label) for label in wanted]
        unlisted = sorted(set(found) - set(wanted))
        absent = sorted(set(wanted) - set(found))
        if unlisted or absent:
            problems = [f"{label!r} has images but is not in data.classes" for label in unlisted]
            problems += [f"{label!r} is in data.classes but has no images" for label in absent]
            cure = "make them agree, or leave classes out with data.only" if unlisted else "make them agree"
            raise UserError(f"data.classes does not match the data; {cure}:\n{listing(problems)}")
    classes = found if wanted is None else wanted
    check_labels(classes)
    return classes


def check_labels(classes: list[str]) -> None:
    """Refuse a label set in which answers cannot be told apart.

    Raises:
        UserError: there are fewer than two classes; a label has no letter, digit or symbol, or contains a tag; or two
            labels differ only in case, spaces, hyphens, underscores or punctuation.
    """
    if len(classes) < 2:
        raise UserError(f"a data set needs at least two classes, got {classes!r}")
    seen: dict[str, str] = {}
    for label in classes:
        key = _answer(label, f"class {label!r}")
        if key in seen:
            raise UserError(
                f"classes {seen[key]!r} and {label!r} are the same answer: case, spaces, hyphens, "
                f"underscores and punctuation do not count. Merge or rename one of them"
            )
        seen[key] = label


def check_names(classes: list[str]) -> None:
    """Refuse names that would be taken for something else.

    Raises:
        UserError: a name holds a tag by which a question shows a layout, or is what is said where there is no class.
    """
    for label in classes:
        if tag := TAG.search(label):
            raise UserError(
                f"class {label!r} holds {tag[0]}: in a question that lists the classes it would be taken for a tag of "
                f"the answer's layout. {RENAME}"
            )
        if normalise_label(label) in map(normalise_label, (UNSURE, NO_CLASS)):
            raise UserError(
                f"class {label!r} cannot be told from {UNSURE} and {NO_CLASS}, which predict and evaluate say where "
                f"no class is answered. {RENAME}"
            )


def check_aliases(classes: list[str], aliases: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """`data.aliases` by class; a class without any is left out.

    Raises:
        UserError: a key is not one of `classes`, or an alias is empty or equals another class or its alias.
    """
    owners = {normalise_label(label): (label, f"class {label!r}") for label in classes}
    checked = {}
    for key, names in aliases.items():
        label = composed(key)
        if label not in classes:
            near = nearest(normalise_label(label), owners)
            known = ", ".join(map(repr, classes[:LISTED]))
            cure = f"did you mean {owners[near][0]!r}?" if near else f"the classes are {known}"
            raise UserError(f"data.aliases: {key!r} is none of the classes; {cure}")
        for name in names:
            what = f"{name!r} of {label!r}"
            owner, theirs = owners.setdefault(_answer(name, f"data.aliases: {what}"), (label, what))
            if owner != label:
                raise UserError(
                    f"data.aliases: {what} is the same answer as {theirs}; leave it out, or ask for one class of both"
                )
        if names:
            checked[label] = tuple(names)
    return checked


def _answer(label: str, what: str) -> str:
    """The normalised label, which answers are compared with. `what` names the label in the message."""
    key = normalise_label(label)
    if not key:
        raise UserError(f"{what} has no letter, digit or symbol, so no answer could match it: rename it")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
        raise UserError(f"{what} has a control character or one that is no Unicode: rename it")
    if extract_answer(f"<answer>{label}</answer>") != label:
        raise UserError(f"{what} holds an answer tag, so no answer could be it: rename it")
    return key


def composed(label: str) -> str:
    """The label in Unicode NFC. File systems store accented letters in one character or in two."""
    return unicodedata.normalize("NFC", label)


def listing(lines: list[str]) -> str:
    """The lines, indented and escaped; beyond the 40th only their number."""
    rest = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join(f"  {shown(line)}" for line in [*lines[:LISTED], *rest])


def seeded_generator(*parts: int | str) -> np.random.Generator:
    """A random generator for these parts; the same in every process, and independent for other parts."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
