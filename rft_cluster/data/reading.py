"""Reading labelled images: all that cannot be used are found at once."""

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
    """Labelled images of a split, which `read` gives one by one, by example id."""

    examples: list[Example]
    """Without their images."""
    digests: list[str]
    """Equal for equal images; empty for one that cannot be used."""
    read: Callable[[str], bytes]
    where: str
    """For the messages."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Those already known to be of no use, by id with the reason."""
    decoded: bool = False
    """Each has been decoded once: none is tried again. Else only the chosen are decoded."""

    def without(self, ids: Collection[str]) -> "Unread":
        return self.where_id(lambda example_id: example_id not in ids)

    def where_id(self, kept: Callable[[str], bool]) -> "Unread":
        pairs = [(e, digest) for e, digest in zip(self.examples, self.digests, strict=True) if kept(e.example_id)]
        skipped = {example_id: reason for example_id, reason in self.skipped.items() if kept(example_id)}
        return replace(self, examples=[e for e, _ in pairs], digests=[digest for _, digest in pairs], skipped=skipped)

    def named(self, names: dict[str, str]) -> "Unread":
        """Those whose labels are in `names`, with the names for labels."""
        labels = {e.example_id: e.label for e in self.examples}
        kept = self.where_id(lambda example_id: labels[example_id] in names)
        return replace(kept, examples=[replace(e, label=names[e.label]) for e in kept.examples])


def decoded(examples: list[Example], read: Callable[[str], bytes], where: str, config: DataSection) -> Unread:
    """All of the examples, decoded once and forgotten.

    Raises:
        UserError: some cannot be used and `config.on_bad_image` is not skip.
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
    """The examples with their images, which `read` gives by example id, and the images' digests.

    Third are the ids of those that cannot be used, with the reason: `read` or `check_image` refused them (OSError or
    UserError). They have no image and an empty digest.
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
    """An image, its digest, and why it cannot be used: then the first two are empty, else the third is."""
    try:
        data = read(example_id)
        return data, check_image(data, example_id, Limits(config.max_pixels, config.max_bytes)), ""
    except OSError as error:
        return b"", "", error.strerror or str(error)
    except UserError as error:
        return b"", "", str(error).removeprefix(f"{example_id}: ")


def skip_or_refuse(bad: dict[str, str], of: str, config: DataSection) -> None:
    """Raises:
    UserError: there are bad images and `config.on_bad_image` is not skip; all are named.
    """
    if bad and config.on_bad_image == "error":
        raise UserError(
            f"{len(bad)} of the {of} cannot be used; mend or remove them, or set data.on_bad_image=skip:\n"
            f"{listing([f'{example_id}: {reason}' for example_id, reason in bad.items()])}"
        )
