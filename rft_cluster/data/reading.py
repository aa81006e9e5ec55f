"""Read labelled images, and report all unusable ones in one message."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from rft_cluster.common.errors import UserError
from rft_cluster.common.progress import with_progress
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import listing
from rft_cluster.data.images import Limits, check_image
from rft_cluster.messages import Example


@dataclass(frozen=True)
class Unread:
    """Labelled images of a split. `read(example_id)` returns the bytes of one."""

    examples: list[Example]
    """Without their images."""
    digests: list[str]
    """Equal for equal images; empty for an unusable one."""
    read: Callable[[str], bytes]
    where: str
    """Names the images in messages."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Maps the id of each image known to be unusable to the reason."""
    decoded: bool = False
    """True if every image has been decoded once. Otherwise the chosen ones are decoded later."""

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


def decoded(examples: list[Example], read: Callable[[str], bytes], where: str, config: DataSection) -> Unread:
    """Decode every image once, for its digest, without keeping it.

    Raises:
        UserError: some are unusable and `config.on_bad_image` is not skip.
    """
    digests, bad = [], {}
    for example in with_progress(examples, "reading images"):
        digest, reason = _try(example.example_id, read, config)[1:]
        digests.append(digest)
        if reason:
            bad[example.example_id] = reason
    skip_or_refuse(bad, where, config)
    return Unread(examples, digests, read, where, bad, decoded=True)


def read_images(
    examples: list[Example], read: Callable[[str], bytes], config: DataSection
) -> tuple[list[Example], list[str], dict[str, str]]:
    """Read and check the examples' images. Returns the examples with images, the digests, and the bad ids with reasons.

    An image is bad if `read` or `check_image` raises OSError or UserError. It is returned empty, with an empty digest.
    """
    complete, digests, bad = [], [], {}
    for example in with_progress(examples, "reading images"):
        image, digest, reason = _try(example.example_id, read, config)
        if reason:
            bad[example.example_id] = reason
        complete.append(replace(example, image=image))
        digests.append(digest)
    return complete, digests, bad


def _try(example_id: str, read: Callable[[str], bytes], config: DataSection) -> tuple[bytes, str, str]:
    """(image, digest, "") for a good image, (b"", "", reason) for a bad one."""
    try:
        data = read(example_id)
        return data, check_image(data, example_id, Limits(config.max_pixels, config.max_bytes)), ""
    except OSError as error:
        return b"", "", error.strerror or str(error)
    except UserError as error:
        return b"", "", str(error).removeprefix(f"{example_id}: ")


def skip_or_refuse(bad: dict[str, str], of: str, config: DataSection) -> None:
    """Raises:
    UserError: there are bad images and `config.on_bad_image` is not skip; the message names all.
    """
    if bad and config.on_bad_image == "error":
        raise UserError(
            f"{len(bad)} of the {of} cannot be used; mend or remove them, or set data.on_bad_image=skip:\n"
            f"{listing([f'{example_id}: {reason}' for example_id, reason in bad.items()])}"
        )
