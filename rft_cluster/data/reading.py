"""Read labelled images, and report all unusable ones in one message."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rft_cluster.common.errors import UserError
from rft_cluster.common.progress import with_progress
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import listing
from rft_cluster.data.images import Limits, check_image, image_sha256
from rft_cluster.messages import Example, ImageRef


@dataclass(frozen=True, slots=True)
class Labelled:
    """The id and label of an image that is not read yet."""

    example_id: str
    label: str
    aliases: tuple[str, ...] = ()

    def example(self, sha256: str) -> Example:
        return Example(ImageRef(self.example_id, sha256), self.label, self.aliases)


class Seen(NamedTuple):
    """Two digests of an image that was decoded: `sha256` of its file, `pixels` of its picture (`check_image`)."""

    sha256: str
    pixels: str


@dataclass(frozen=True)
class Unread:
    """Labelled images of a split. `read(example_id)` returns the bytes of one."""

    examples: list[Labelled]
    digests: list[str]
    """Equal for equal images; empty for an unusable one."""
    read: Callable[[str], bytes]
    where: str
    """Names the images in messages."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Maps the id of each image known to be unusable to the reason."""
    seen: dict[str, Seen] = field(default_factory=dict)
    """Maps the id of each image that has been decoded to its digests. Other images are decoded when chosen."""

    def without(self, ids: Collection[str]) -> "Unread":
        return self.where_id(lambda example_id: example_id not in ids)

    def where_id(self, kept: Callable[[str], bool]) -> "Unread":
        pairs = [(e, digest) for e, digest in zip(self.examples, self.digests, strict=True) if kept(e.example_id)]
        skipped = {example_id: reason for example_id, reason in self.skipped.items() if kept(example_id)}
        return replace(self, examples=[e for e, _ in pairs], digests=[digest for _, digest in pairs], skipped=skipped)

    def named(self, names: dict[str, str]) -> "Unread":
        """Keep the images whose labels are keys of `names`, and rename the labels accordingly."""
        labels = {e.example_id: e.label for e in self.examples}
        kept = self.where_id(lambda example_id: labels[example_id] in names)
        return replace(kept, examples=[replace(e, label=names[e.label]) for e in kept.examples])


def decoded(examples: list[Labelled], read: Callable[[str], bytes], where: str, config: DataSection) -> Unread:
    """Decode every image once, for its digest, without keeping it.

    Raises:
        UserError: some are unusable and `config.on_bad_image` is not skip.
    """
    seen, bad = look_at(examples, read, config)
    skip_or_refuse(bad, where, config)
    return Unread(examples, pixels_of(examples, seen), read, where, bad, seen)


def look_at(
    examples: list[Labelled], read: Callable[[str], bytes], config: DataSection
) -> tuple[dict[str, Seen], dict[str, str]]:
    """Decode each image once without keeping it, so that memory does not grow with their number.

    Returns id -> digests of the usable images, and id -> reason of the unusable ones, for which `read` or `check_image`
    raised OSError or UserError.
    """
    seen: dict[str, Seen] = {}
    bad: dict[str, str] = {}
    for example in with_progress(examples, "reading images"):
        example_id = example.example_id
        try:
            data = read(example_id)
            pixels = check_image(data, example_id, Limits(config.max_pixels, config.max_bytes))
        except OSError as error:
            bad[example_id] = error.strerror or str(error)
        except UserError as error:
            bad[example_id] = str(error).removeprefix(f"{example_id}: ")
        else:
            seen[example_id] = Seen(image_sha256(data), pixels)
    return seen, bad


def pixels_of(examples: list[Labelled], seen: Mapping[str, Seen]) -> list[str]:
    """The examples' pixel digests in order, empty for unusable images."""
    return [seen[e.example_id].pixels if e.example_id in seen else "" for e in examples]


def read_again(example_id: str, sha256: str, read: Callable[[str], bytes]) -> bytes:
    """Read an image again after `look_at`.

    Raises:
        UserError: its bytes have changed since.
    """
    data = read(example_id)
    if image_sha256(data) != sha256:
        raise UserError(
            f"{example_id} changed while the data set was being read; start again when nothing writes there"
        )
    return data


def skip_or_refuse(bad: dict[str, str], of: str, config: DataSection) -> None:
    """Raises:
    UserError: there are bad images and `config.on_bad_image` is not skip; the message names all.
    """
    if bad and config.on_bad_image == "error":
        raise UserError(
            f"{len(bad)} of the {of} cannot be used; fix or remove them, or set data.on_bad_image=skip:\n"
            f"{listing([f'{example_id}: {reason}' for example_id, reason in bad.items()])}"
        )
